"""Tier-2 rules inside the cluster simulator.

Which clock an instance asks for when an iteration is about to start.

These are the rules of the published controllers, evaluated on the state with the plant's own
coefficients, so that a day of a cluster runs in minutes. The policies in ``controllers`` work from
observations and may hold another model than the plant; tests compare the two. Bounds are the SLO
less a margin: ``bound = slo * (1 - margin)``.
"""

from typing import Any

import numpy as np

from biscale_env.core.jit import inlined
from biscale_env.sim.clock import time_to_apply_s, under_cap
from biscale_env.sim.cluster.layout import ECOFREQ, EXTERNAL, MPC, SLACK, STATIC, THROTTLLEM
from biscale_env.sim.prefill import form_batch

BIN_REQUESTS = 8.0  # EcoFreq's bins of the decode batch
# relative: two levels above the power cap run alike but for the rounding of the search for the
# effective clock
SAME = 1e-6
LOST_S = np.inf  # slack of a batch whose deadlines have passed: it constrains nothing


@inlined
def lowest_level_ghz(
    c: Any,
    p: Any,
    levels_ghz: Any,
    tokens: float,
    attn_work: float,
    cached: float,
    n_seq: float,
    bound_s: float,
) -> float:
    """Lowest level at which an iteration takes no longer than ``bound_s``.

    The highest if none does.
    """
    for k in range(levels_ghz.size - 1):
        if under_cap(c, p, tokens, attn_work, cached, n_seq, levels_ghz[k])[1] <= bound_s:
            return levels_ghz[k]
    return levels_ghz[-1]


@inlined
def slack_ghz(st: Any, c: Any, p: Any, meta: Any, levels_ghz: Any) -> float:
    """BiScale decode: lowest level whose next interval between tokens meets the TPOT bound.

    KV above the guard: highest.
    """
    if st.cached > meta.kv_guard * p.kv_capacity:
        return levels_ghz[-1]
    bound = p.slo_s * (1.0 - meta.margin)
    return lowest_level_ghz(
        c,
        p,
        levels_ghz,
        st.batch + st.recompute_tokens,
        st.recompute_attn,
        st.cached,
        st.batch,
        bound,
    )


@inlined
def throttllem_ghz(st: Any, c: Any, p: Any, meta: Any, levels_ghz: Any) -> float:
    """throttLL'eM: batch and KV projected ahead (all that wait join, all run on), lowest level
    whose mean interval meets the bound.
    """
    batch = min(st.batch + st.end - st.head, p.max_seqs)
    cached = min(st.cached + meta.load_tokens + 0.5 * meta.ahead * batch, p.kv_capacity)
    bound = p.slo_s * (1.0 - meta.margin)
    return lowest_level_ghz(
        c, p, levels_ghz, batch + st.recompute_tokens, st.recompute_attn, cached, batch, bound
    )


@inlined
def ecofreq_decode_ghz(st: Any, c: Any, p: Any, meta: Any, levels_ghz: Any) -> float:
    """VoltanaLLM EcoFreq, decode: anything waiting: highest.

    Else the first level whose iteration meets the bound.

    As in the source, the predictor is binned by batches of 8.
    """
    if st.head < st.tail or st.preempted > 0:
        return levels_ghz[-1]
    bound = p.slo_s * (1.0 - meta.margin)
    batch = np.ceil(st.batch / BIN_REQUESTS) * BIN_REQUESTS
    rows = max(st.batch + st.recompute_tokens, batch)
    return lowest_level_ghz(c, p, levels_ghz, rows, st.recompute_attn, st.cached, batch, bound)


@inlined
def decode_ghz(st: Any, c: Any, p: Any, meta: Any, levels_ghz: Any) -> float:
    """Clock that the instance's policy asks for now, GHz.

    A policy of the other phase means the base clock.
    """
    if meta.policy == EXTERNAL:
        return meta.decided_ghz
    if meta.policy == SLACK:
        return slack_ghz(st, c, p, meta, levels_ghz)
    if meta.policy == ECOFREQ:
        return ecofreq_decode_ghz(st, c, p, meta, levels_ghz)
    if meta.policy == THROTTLLEM:
        return throttllem_ghz(st, c, p, meta, levels_ghz)
    return meta.base_ghz


@inlined
def ecofreq_prefill_ghz(
    st: Any,
    c: Any,
    p: Any,
    meta: Any,
    levels_ghz: Any,
    arrival_s: Any,
    tokens: float,
    attn_work: float,
    n_seq: float,
) -> float:
    """EcoFreq, prefill: requests behind this batch: highest.

    Else the first level that meets SLO (1 - margin) - wait.
    """
    if st.tail - st.head > n_seq:
        return levels_ghz[-1]
    bound = p.slo_s * (1.0 - meta.margin) - (st.time_s - arrival_s[st.head])
    return lowest_level_ghz(c, p, levels_ghz, tokens, attn_work, 0.0, n_seq, bound)


@inlined
def project_batches(
    st: Any, c: Any, p: Any, margin: float, levels_ghz: Any, arrival_s: Any, prompt: Any, times: Any, joules: Any, slack: Any
) -> int:  # fmt: skip
    """Roll out the queue in batches.

    Time and energy of each at every level, and its slack if all ran at the highest.

    A batch counts by its tightest deadline that can still be met. One that only misses the margin
    has slack 0.

    Returns:
        How many batches the queue fills, at most the horizon.
    """
    head = st.head
    head_done = st.head_done
    now = st.time_s
    top = levels_ghz.size - 1
    count = 0
    while count < slack.size and head < st.tail:
        first = head
        tokens, attn_work, n_seq, head, head_done = form_batch(
            prompt, head, head_done, st.tail, p.token_budget, p.max_seqs
        )
        for k in range(levels_ghz.size):
            _, times[count, k], joules[count, k] = under_cap(
                c, p, tokens, attn_work, 0.0, n_seq, levels_ghz[k]
            )
        now += times[count, top]
        slack[count] = LOST_S
        for r in range(first, head):
            left = arrival_s[r] + p.slo_s - now
            if left >= 0.0:
                slack[count] = min(slack[count], max(left - margin * p.slo_s, 0.0))
        count += 1
    return count


@inlined
def best_lowering(times: Any, joules: Any, slack: Any, level: Any, count: int) -> int:
    """Batch whose next lower level saves the most energy per second lost and breaks no deadline.

    -1: none.
    """
    best = -1
    best_gain = 0.0
    room = np.inf
    for k in range(count - 1, -1, -1):
        room = min(room, slack[k])
        now = level[k]
        if now == 0:
            continue
        lost = times[k, now - 1] - times[k, now]
        saved = joules[k, now] - joules[k, now - 1]
        if lost > room or saved < -SAME * joules[k, now]:
            continue
        gain = saved / max(lost, 1e-12)
        if best < 0 or gain > best_gain:
            best, best_gain = k, gain
    return best


@inlined
def mpc_ghz(
    st: Any, c: Any, p: Any, meta: Any, levels_ghz: Any, arrival_s: Any, prompt: Any, times: Any, joules: Any, slack: Any, level: Any
) -> float:  # fmt: skip
    """BiScale prefill: one level per projected batch, all at the highest first, then greedily
    lowered; the first is applied.

    The clock under way is taken into account: until it applies, the first batch runs at the clock
    in force.
    """
    count = project_batches(
        st, c, p, meta.margin, levels_ghz, arrival_s, prompt, times, joules, slack
    )
    top = levels_ghz.size - 1
    late = 0.0
    if st.freq_ghz < levels_ghz[-1] and count > 0:
        wait = time_to_apply_s(st, p) if st.wanted_ghz == levels_ghz[-1] else p.delay_s
        tokens, attn_work, n_seq, _, _ = form_batch(
            prompt, st.head, st.head_done, st.tail, p.token_budget, p.max_seqs
        )
        slow = under_cap(c, p, tokens, attn_work, 0.0, n_seq, st.freq_ghz)[1]
        late = min(wait, slow) * (1.0 - times[0, top] / slow)
    for k in range(count):
        level[k] = top
        slack[k] = max(slack[k] - late, 0.0)
    while True:
        k = best_lowering(times, joules, slack, level, count)
        if k < 0:
            break
        lost = times[k, level[k] - 1] - times[k, level[k]]
        level[k] -= 1
        for m in range(k, count):
            slack[m] -= lost
    return levels_ghz[level[0]]


@inlined
def throttllem_prefill_ghz(
    st: Any, c: Any, p: Any, meta: Any, levels_ghz: Any, arrival_s: Any, prompt: Any, times: Any, joules: Any, slack: Any
) -> float:  # fmt: skip
    """throttLL'eM, prefill: the lowest single level at which every projected batch meets its
    deadlines; the highest if none.
    """
    count = project_batches(
        st, c, p, meta.margin, levels_ghz, arrival_s, prompt, times, joules, slack
    )
    top = levels_ghz.size - 1
    for level in range(top):
        lost = 0.0
        meets = True
        for k in range(count):
            lost += times[k, level] - times[k, top]
            meets = meets and lost <= slack[k]
        if meets:
            return levels_ghz[level]
    return levels_ghz[-1]


@inlined
def prefill_ghz(
    st: Any, c: Any, p: Any, meta: Any, levels_ghz: Any, arrival_s: Any, prompt: Any, tokens: float, attn_work: float, n_seq: float,
    times: Any, joules: Any, slack: Any, level: Any,
) -> float:  # fmt: skip
    """Clock that the instance's policy asks for before a batch, GHz.

    A policy of the other phase means the base clock.
    """
    if meta.policy == STATIC:
        return meta.base_ghz
    if meta.policy == EXTERNAL:
        return meta.decided_ghz
    if meta.policy == MPC:
        return mpc_ghz(st, c, p, meta, levels_ghz, arrival_s, prompt, times, joules, slack, level)
    if meta.policy == ECOFREQ:
        return ecofreq_prefill_ghz(st, c, p, meta, levels_ghz, arrival_s, tokens, attn_work, n_seq)
    if meta.policy == THROTTLLEM:
        return throttllem_prefill_ghz(
            st, c, p, meta, levels_ghz, arrival_s, prompt, times, joules, slack
        )
    return meta.base_ghz
