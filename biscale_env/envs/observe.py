"""Compiled observers: read the state of an instance into its observation vector (see the tables in
``contract.observation``).
"""

from typing import Any

import numpy as np

from biscale_env.contract.observation import DECODE_SPEC, HORIZON, PREFILL_SPEC
from biscale_env.core.jit import inlined
from biscale_env.sim.arrivals import N_WINDOWS, decay_rates, rate_scale
from biscale_env.sim.clock import time_to_apply_s
from biscale_env.sim.prefill import form_batch
from biscale_env.sim.state import RATE_WINDOWS_S, TOKEN_RATE_WINDOW_S

NO_DEADLINE = 10.0  # encoded slack when no request completes in a projected batch

P_QUEUE = PREFILL_SPEC.index("queue_requests")
P_RATES = PREFILL_SPEC.index("arrival_rate_1s")
P_CLOCK = PREFILL_SPEC.index("freq_current")
P_SLO = PREFILL_SPEC.index("slo")
D_RATES = DECODE_SPEC.index("arrival_rate_1s")
D_CLOCK = DECODE_SPEC.index("freq_current")
D_SLO = DECODE_SPEC.index("slo")


@inlined
def observe_rates(st: Any, out: Any, at: int) -> None:
    """Arrival rates, four values."""
    decay_rates(st, st.time_s)
    counted_s = st.time_s - st.rate_start_s
    for k in range(N_WINDOWS):
        out[at + k] = st.rate_sum[k] * rate_scale(counted_s, RATE_WINDOWS_S[k])
    out[at + N_WINDOWS] = st.token_rate_sum * rate_scale(counted_s, TOKEN_RATE_WINDOW_S)


@inlined
def observe_clock(st: Any, p: Any, out: Any, at: int) -> None:
    """Clock and last iteration, six values."""
    out[at] = st.freq_ghz * 1e3
    out[at + 1] = st.wanted_ghz * 1e3
    out[at + 2] = time_to_apply_s(st, p)
    out[at + 3] = p.delay_s
    out[at + 4] = st.last_time_s
    out[at + 5] = st.last_power_w


@inlined
def observe_prefill(
    st: Any, p: Any, arrival_s: Any, prompt: Any, cumulative: Any, out: Any
) -> None:
    """Physical values of the prefill observation.

    ``cumulative[r]`` counts the prompt tokens before request r.
    """
    head = st.head
    head_done = st.head_done
    for k in range(HORIZON):
        first = head
        tokens, attn_work, n_seq, head, head_done = form_batch(
            prompt, head, head_done, st.tail, p.token_budget, p.max_seqs
        )
        slack = NO_DEADLINE
        alive = NO_DEADLINE
        for r in range(first, head):
            s = (arrival_s[r] + p.slo_s - st.time_s) / p.slo_s
            slack = min(slack, s)
            if s > 0.0:
                alive = min(alive, s)
        out[k] = tokens
        out[HORIZON + k] = attn_work
        out[2 * HORIZON + k] = n_seq
        out[3 * HORIZON + k] = head - first
        out[4 * HORIZON + k] = slack
        out[5 * HORIZON + k] = alive
    out[P_QUEUE] = st.tail - st.head
    out[P_QUEUE + 1] = cumulative[st.tail] - cumulative[st.head] - st.head_done
    out[P_QUEUE + 2] = (st.time_s - arrival_s[st.head]) / p.slo_s if st.head < st.tail else 0.0
    observe_rates(st, out, P_RATES)
    observe_clock(st, p, out, P_CLOCK)
    out[P_SLO] = p.slo_s
    out[P_SLO + 1] = st.backpressure


@inlined
def observe_decode(
    st: Any, p: Any, arrival_s: Any, prompt: Any, cumulative: Any, tree: Any, stack: Any, out: Any
) -> None:
    """Physical values of the decode observation.

    ``cumulative[r]`` counts the prompt tokens before request r.
    """
    waiting_tokens = cumulative[st.tail] - cumulative[st.head] + (st.tail - st.head)
    oldest = st.time_s
    if st.head < st.tail:
        oldest = arrival_s[st.head]
    for k in range(st.preempted):
        waiting_tokens += prompt[stack[k, 0]] + stack[k, 1]
        oldest = min(oldest, arrival_s[stack[k, 0]])
    base = p.slo_s * (st.iterations - 1) - st.time_s
    out[0] = st.batch
    out[1] = st.cached
    out[2] = st.cached / p.kv_capacity
    out[3] = st.recompute_tokens
    out[4] = st.tail - st.head + st.preempted
    out[5] = waiting_tokens
    out[6] = st.time_s - oldest
    out[7] = st.incoming
    out[8] = (tree[1] + base) / p.slo_s if st.batch > 0 else 0.0
    out[9] = (st.key_sum / st.batch + base) / p.slo_s if st.batch > 0 else 0.0
    observe_rates(st, out, D_RATES)
    observe_clock(st, p, out, D_CLOCK)
    out[D_SLO] = p.slo_s


@inlined
def encode(physical: Any, scale: Any, low: Any, high: Any, out: Any) -> None:
    """Scale and clip into the float32 observation."""
    for i in range(physical.size):
        out[i] = np.float32(min(max(physical[i] / scale[i], low[i]), high[i]))
