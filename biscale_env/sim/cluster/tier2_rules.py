"""Tier-2 rules inside the cluster simulator.

Which clock an instance requests when an iteration is about to start.

The laws are those of the published controllers (:mod:`biscale_env.laws`), fed here from the state
and with the plant's own coefficients, so that a day of a cluster runs in minutes. The policies in
``controllers`` feed the same laws from observations and may hold another model than the plant.
Limits are the SLO less a margin.
"""

from typing import NamedTuple

import numpy as np

from biscale_env.core.jit import inlined
from biscale_env.laws.ecofreq_law import binned_requests, ecofreq_level
from biscale_env.laws.greedy_law import lower_greedily
from biscale_env.laws.level_search import first_token_limit_s, interval_limit_s
from biscale_env.laws.slack_law import slack_level
from biscale_env.laws.throttllem_law import (
    DecodeOutlook,
    lowest_level_for_queue,
    project_decode,
    throttllem_level,
)
from biscale_env.sim.clock import running_ghz, time_to_apply_s, under_cap
from biscale_env.sim.cluster.layout import (
    ECOFREQ,
    EXTERNAL,
    MPC,
    SLACK,
    THROTTLLEM,
    Decodes,
    Floats,
    Prefills,
)
from biscale_env.sim.prefill import form_batch

BIN_REQUESTS = 8.0  # EcoFreq's bins of the decode batch


class BatchWork(NamedTuple):
    """Work of one iteration, as the latency formula takes it."""

    tokens: float  # GEMM rows
    attn_work: float  # attention work, token^2
    cached: float  # KV tokens read
    n_seq: float  # requests


class WorkAtClocks(NamedTuple):
    """Where :func:`capped_latency_s` computes latencies from."""

    coef: np.record
    params: np.record
    work: BatchWork
    levels_ghz: Floats


@inlined
def capped_latency_s(at: WorkAtClocks, k: int) -> float:
    """Latency of the work at level ``k`` under the power cap, s."""
    w = at.work
    freq_ghz = at.levels_ghz[k]
    capped = under_cap(at.coef, at.params, w.tokens, w.attn_work, w.cached, w.n_seq, freq_ghz)
    return float(capped[1])


@inlined
def slack_ghz(pool: Decodes, j: int, levels_ghz: Floats) -> float:
    """BiScale decode, see :mod:`biscale_env.laws.slack_law`."""
    st, p, meta = pool.states[j], pool.params[j], pool.meta[j]
    rows = st.batch + st.recompute_tokens
    work = BatchWork(rows, st.recompute_attn, st.cached, st.batch)
    at = WorkAtClocks(pool.coefs[j], p, work, levels_ghz)
    limit = interval_limit_s(p.slo_s, meta.margin)
    above = st.cached > meta.kv_guard * p.kv_capacity
    return float(levels_ghz[slack_level(capped_latency_s, at, levels_ghz.size, limit, above)])


@inlined
def decode_outlook(pool: Decodes, j: int) -> DecodeOutlook:
    """What decode instance ``j`` has and what will join it; prompt lengths are known here."""
    st = pool.states[j]
    cached = st.cached + pool.meta[j].load_tokens
    for k in range(st.preempted):
        row = pool.running.stack[j, k, 0]
        cached += pool.queue.prompt[j, row] + pool.running.stack[j, k, 1]
    joining = st.end - st.head + st.preempted
    return DecodeOutlook(
        float(st.batch),
        float(joining),
        float(cached),
        float(st.recompute_tokens),
        st.recompute_attn,
    )


@inlined
def throttllem_decode_ghz(pool: Decodes, j: int, levels_ghz: Floats) -> float:
    """throttLL'eM, see :mod:`biscale_env.laws.throttllem_law`, on the control levels."""
    p, meta = pool.params[j], pool.meta[j]
    then = project_decode(decode_outlook(pool, j), meta.ahead, p.kv_capacity, p.max_seqs)
    work = BatchWork(then.rows, then.attn_work, then.cached, then.n_seq)
    at = WorkAtClocks(pool.coefs[j], p, work, levels_ghz)
    limit = interval_limit_s(p.slo_s, meta.margin)
    n = levels_ghz.size
    return float(levels_ghz[throttllem_level(capped_latency_s, at, n, limit, then.overflows)])


@inlined
def ecofreq_decode_ghz(pool: Decodes, j: int, levels_ghz: Floats) -> float:
    """EcoFreq, decode, see :mod:`biscale_env.laws.ecofreq_law`."""
    st, p, meta = pool.states[j], pool.params[j], pool.meta[j]
    batch = binned_requests(st.batch, BIN_REQUESTS)
    rows = max(st.batch + st.recompute_tokens, batch)
    work = BatchWork(rows, st.recompute_attn, st.cached, batch)
    at = WorkAtClocks(pool.coefs[j], p, work, levels_ghz)
    limit = interval_limit_s(p.slo_s, meta.margin)
    waiting = st.head < st.tail or st.preempted > 0
    return float(levels_ghz[ecofreq_level(capped_latency_s, at, levels_ghz.size, limit, waiting)])


@inlined
def decode_ghz(pool: Decodes, j: int, levels_ghz: Floats) -> float:
    """Clock that the rule of decode (or co-located) instance ``j`` requests now, GHz.

    A rule of the other phase means the base clock.
    """
    meta = pool.meta[j]
    if meta.policy == EXTERNAL:
        return float(meta.decided_ghz)
    if meta.policy == SLACK:
        return slack_ghz(pool, j, levels_ghz)
    if meta.policy == ECOFREQ:
        return ecofreq_decode_ghz(pool, j, levels_ghz)
    if meta.policy == THROTTLLEM:
        return throttllem_decode_ghz(pool, j, levels_ghz)
    return float(meta.base_ghz)


@inlined
def ecofreq_prefill_ghz(pool: Prefills, i: int, levels_ghz: Floats, batch: BatchWork) -> float:
    """EcoFreq, prefill, see :mod:`biscale_env.laws.ecofreq_law`."""
    st, p, meta = pool.states[i], pool.params[i], pool.meta[i]
    waited = (st.time_s - pool.queue.arrival_s[i, st.head]) / p.slo_s
    limit = first_token_limit_s(p.slo_s, meta.margin, waited)
    waiting = st.tail - st.head > batch.n_seq
    at = WorkAtClocks(pool.coefs[i], p, batch, levels_ghz)
    return float(levels_ghz[ecofreq_level(capped_latency_s, at, levels_ghz.size, limit, waiting)])


@inlined
def tightest_slack_s(pool: Prefills, i: int, first: int, end: int, now_s: float) -> float:
    """Least slack of rows ``first .. end - 1`` of prefill instance ``i`` at ``now_s``, s.

    Deadlines that have passed constrain nothing (inf); one that only misses the margin has
    slack 0.
    """
    p = pool.params[i]
    slack = np.inf
    for r in range(first, end):
        left = pool.queue.arrival_s[i, r] + p.slo_s - now_s
        if left >= 0.0:
            slack = min(slack, max(left - pool.meta[i].margin * p.slo_s, 0.0))
    return float(slack)


@inlined
def project_batches(pool: Prefills, i: int, levels_ghz: Floats) -> int:
    """Project the queue of prefill instance ``i`` in batches, into its plans.

    Latency and energy of each at every level, and its deadline: the tightest of its requests that
    can still be met if every batch runs at the highest level.

    Returns:
        How many batches the queue fills, at most the horizon.
    """
    st, c, p, plans = pool.states[i], pool.coefs[i], pool.params[i], pool.plans
    head, head_done = st.head, st.head_done
    top = levels_ghz.size - 1
    now_s, done_s, count = st.time_s, 0.0, 0
    while count < plans.deadline_s.shape[1] and head < st.tail:
        first = head
        tokens, attn_work, n_seq, head, head_done = form_batch(
            pool.queue.prompt[i],
            pool.queue.prefix[i],
            head,
            head_done,
            st.tail,
            p.token_budget,
            p.max_seqs,
        )
        for k in range(levels_ghz.size):
            _, latency, joules = under_cap(c, p, tokens, attn_work, 0.0, n_seq, levels_ghz[k])
            plans.latency_s[i, count, k] = latency
            plans.energy_j[i, count, k] = joules
        now_s += plans.latency_s[i, count, top]
        done_s += plans.latency_s[i, count, top]
        plans.deadline_s[i, count] = done_s + tightest_slack_s(pool, i, first, head, now_s)
        count += 1
    return count


@inlined
def spend_clock_delay(pool: Prefills, i: int, levels_ghz: Floats, n: int) -> None:
    """Take off the deadlines what the first of ``n`` batches loses at the applied clock.

    The highest clock takes effect only after a delay. A deadline that is missed thereby constrains
    as if it were just met.
    """
    st, p, plans = pool.states[i], pool.params[i], pool.plans
    highest, now_ghz = levels_ghz[-1], running_ghz(st, p)
    if not now_ghz < highest:
        return
    wait = time_to_apply_s(st, p) if st.requested_ghz == highest else p.delay_s
    tokens, attn_work, n_seq, _, _ = form_batch(
        pool.queue.prompt[i],
        pool.queue.prefix[i],
        st.head,
        st.head_done,
        st.tail,
        p.token_budget,
        p.max_seqs,
    )
    slow = under_cap(pool.coefs[i], p, tokens, attn_work, 0.0, n_seq, now_ghz)[1]
    late = min(wait, slow) * (1.0 - plans.latency_s[i, 0, levels_ghz.size - 1] / slow)
    done_s = 0.0
    for k in range(n):
        done_s += plans.latency_s[i, k, levels_ghz.size - 1]
        plans.deadline_s[i, k] = max(plans.deadline_s[i, k] - late, done_s)


@inlined
def mpc_ghz(pool: Prefills, i: int, levels_ghz: Floats) -> float:
    """BiScale prefill, see :mod:`biscale_env.laws.greedy_law`.

    The clock under way is taken into account: until it takes effect, the first batch runs at the
    applied one.
    """
    n = project_batches(pool, i, levels_ghz)
    spend_clock_delay(pool, i, levels_ghz, n)
    plans = pool.plans
    lower_greedily(
        plans.latency_s[i, :n], plans.energy_j[i, :n], plans.deadline_s[i, :n], plans.level[i, :n]
    )
    return float(levels_ghz[plans.level[i, 0]])


@inlined
def throttllem_prefill_ghz(pool: Prefills, i: int, levels_ghz: Floats) -> float:
    """throttLL'eM, prefill, see :mod:`biscale_env.laws.throttllem_law`, on the control levels."""
    n = project_batches(pool, i, levels_ghz)
    level = lowest_level_for_queue(pool.plans.latency_s[i, :n], pool.plans.deadline_s[i, :n])
    return float(levels_ghz[level])


@inlined
def prefill_ghz(pool: Prefills, i: int, levels_ghz: Floats, batch: BatchWork) -> float:
    """Clock that the rule of prefill instance ``i`` requests before a batch, GHz.

    A rule of the other phase means the base clock.
    """
    meta = pool.meta[i]
    if meta.policy == EXTERNAL:
        return float(meta.decided_ghz)
    if meta.policy == MPC:
        return mpc_ghz(pool, i, levels_ghz)
    if meta.policy == ECOFREQ:
        return ecofreq_prefill_ghz(pool, i, levels_ghz, batch)
    if meta.policy == THROTTLLEM:
        return throttllem_prefill_ghz(pool, i, levels_ghz)
    return float(meta.base_ghz)
