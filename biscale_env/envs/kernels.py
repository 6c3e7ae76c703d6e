"""Compiled steps of a batch of instances.

Transition, reward, cost and observation in one pass over the records.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.jit import compiled, inlined
from biscale_env.envs.observe import Encoding, encode, observe_decode, observe_prefill
from biscale_env.sim.clock import begin_step
from biscale_env.sim.decode import decode_reset, decode_step, running_of
from biscale_env.sim.prefill import prefill_reset, prefill_step
from biscale_env.sim.state import (
    Floats,
    Ints,
    Records,
    Requests,
    RequestTimes,
    RunningRequests,
    Span,
)


class Instances(NamedTuple):
    """Records of n instances, (n,) each."""

    states: Records  # PREFILL_DTYPE or DECODE_DTYPE
    coefs: Records  # COEFFICIENT_DTYPE
    params: Records  # PARAMS_DTYPE


class OfferedRequests(NamedTuple):
    """The requests of all workloads, and what becomes of them."""

    requests: Requests
    times: RequestTimes


class Starts(NamedTuple):
    """Episodes that begin, (k,) each."""

    rows: Ints  # instances
    begins: Ints  # their requests
    ends: Ints


AHEAD = 16  # rows whose requests are fetched together

TIME, DT, ENERGY, FREQ, COST, DONE = range(6)
"""Rows of the table of what is told of a step; see ``ToldRows`` in :mod:`.batch`."""


class Results(NamedTuple):
    """What a step yields; written."""

    obs: NDArray[np.float32]  # (n, dim)
    reward: Floats  # (n,)
    terms: Floats  # (n, 2): energy, SLO
    told: Floats  # (6, n)


@inlined
def reward_terms(st: Any, p: Any) -> tuple[float, float]:
    """The two dimensionless parts of the reward of the last step: ``(energy term, SLO term)``.

    The reward is their sum.
    """
    return -st.step_energy_j / p.energy_ref_j, -p.violation_weight * st.step_missed


@inlined
def tell(st: Any, told: Floats, i: int) -> None:
    """What infos say of row ``i``, side by side: records of many rows are slow to gather."""
    told[TIME, i] = st.time_s
    told[DT, i] = st.time_s - st.step_start_s
    told[ENERGY, i] = st.step_energy_j
    told[FREQ, i] = st.step_freq_mean_ghz * 1e3
    told[COST, i] = st.step_violations
    told[DONE, i] = st.done


@inlined
def write_reward(st: Any, p: Any, results: Results, i: int) -> None:
    """Put the reward and its parts, and what is told, into row ``i``."""
    energy_term, slo_term = reward_terms(st, p)
    results.terms[i, 0] = energy_term
    results.terms[i, 1] = slo_term
    results.reward[i] = energy_term + slo_term
    tell(st, results.told, i)


@inlined
def rest(st: Any, results: Results, i: int) -> None:
    """A row whose episode is over does and earns nothing."""
    begin_step(st)
    results.terms[i, 0] = 0.0
    results.terms[i, 1] = 0.0
    results.reward[i] = 0.0
    tell(st, results.told, i)


@inlined
def asked_ghz(p: Any, action: float) -> float:
    """Clock that an action in [-1, 1] requests, before snapping, GHz.

    Anything outside is clipped. NaN is the highest clock: a rule of safety for whoever calls the
    kernels; environments refuse it.
    """
    if not action <= 1.0:
        action = 1.0
    return p.freq_min_ghz + 0.5 * (max(action, -1.0) + 1.0) * (p.freq_max_ghz - p.freq_min_ghz)


@inlined
def look_ahead(of: Instances, requests: Requests, first: int, how: Encoding) -> None:
    """Read what the next ``AHEAD`` rows need, at once.

    Rows lie far apart in the tables of requests. What is read is not used (the scratch is written
    anew): the processor fetches several lines of memory in the time of one.
    """
    seen = 0.0
    for i in range(first, min(first + AHEAD, of.states.size)):
        st = of.states[i]
        if st.head < st.end:
            seen += requests.arrival_s[st.head] + requests.prompt[st.head]
    how.physical[0] = seen


@compiled
def prefill_reset_batch(
    of: Instances, work: OfferedRequests, starts: Starts, how: Encoding, results: Results
) -> None:
    """Start episodes in some rows of the batch and observe."""
    for k in range(starts.rows.size):
        i = starts.rows[k]
        st, p = of.states[i], of.params[i]
        span = Span(starts.begins[k], starts.ends[k])
        prefill_reset(st, of.coefs[i], p, work.requests, span, p.freq_max_ghz)
        observe_prefill(st, p, work.requests, how.physical)
        encode(how, results.obs[i])
        tell(st, results.told, i)


@compiled
def prefill_step_batch(
    of: Instances,
    work: OfferedRequests,
    actions: NDArray[np.float32],
    how: Encoding,
    results: Results,
) -> None:
    """One decision in every row that is not done; rows that are done rest."""
    for i in range(of.states.size):
        if i % AHEAD == 0:
            look_ahead(of, work.requests, i, how)
        st, p = of.states[i], of.params[i]
        if st.done == 1:
            rest(st, results, i)
            continue
        freq = asked_ghz(p, actions[i])
        prefill_step(st, of.coefs[i], p, work.requests, work.times, freq)
        write_reward(st, p, results, i)
        observe_prefill(st, p, work.requests, how.physical)
        encode(how, results.obs[i])


@compiled
def decode_reset_batch(
    of: Instances,
    work: OfferedRequests,
    running: RunningRequests,
    starts: Starts,
    how: Encoding,
    results: Results,
) -> None:
    """Start episodes in some rows of the batch and observe."""
    for k in range(starts.rows.size):
        i = starts.rows[k]
        st, p, run = of.states[i], of.params[i], running_of(running, i)
        span = Span(starts.begins[k], starts.ends[k])
        decode_reset(st, of.coefs[i], p, work.requests, work.times, run, span, p.freq_max_ghz)
        observe_decode(st, p, work.requests, run, how.physical)
        encode(how, results.obs[i])
        tell(st, results.told, i)


@compiled
def decode_step_batch(
    of: Instances,
    work: OfferedRequests,
    running: RunningRequests,
    actions: NDArray[np.float32],
    how: Encoding,
    results: Results,
) -> None:
    """One decision in every row that is not done; rows that are done rest."""
    for i in range(of.states.size):
        if i % AHEAD == 0:
            look_ahead(of, work.requests, i, how)
        st, p = of.states[i], of.params[i]
        if st.done == 1:
            rest(st, results, i)
            continue
        run = running_of(running, i)
        freq = asked_ghz(p, actions[i])
        decode_step(st, of.coefs[i], p, work.requests, work.times, run, freq)
        write_reward(st, p, results, i)
        observe_decode(st, p, work.requests, run, how.physical)
        encode(how, results.obs[i])
