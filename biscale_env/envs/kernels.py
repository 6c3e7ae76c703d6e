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
    cumulative: Ints  # (requests + 1,): prompt tokens before each row
    times: RequestTimes


class Starts(NamedTuple):
    """Episodes that begin, (k,) each."""

    rows: Ints  # instances
    begins: Ints  # their requests
    ends: Ints


class Results(NamedTuple):
    """What a step yields; written."""

    obs: NDArray[np.float32]  # (n, dim)
    reward: Floats  # (n,)
    terms: Floats  # (n, 2): energy, SLO


@inlined
def reward_terms(st: Any, p: Any) -> tuple[float, float]:
    """The two dimensionless parts of the reward of the last step: ``(energy term, SLO term)``.

    The reward is their sum.
    """
    return -st.step_energy_j / p.energy_ref_j, -p.violation_weight * st.step_violations


@inlined
def write_reward(st: Any, p: Any, results: Results, i: int) -> None:
    """Put the reward and its parts into row ``i``."""
    energy_term, slo_term = reward_terms(st, p)
    results.terms[i, 0] = energy_term
    results.terms[i, 1] = slo_term
    results.reward[i] = energy_term + slo_term


@inlined
def rest(st: Any, results: Results, i: int) -> None:
    """A row whose episode is over does and earns nothing."""
    begin_step(st)
    results.terms[i, 0] = 0.0
    results.terms[i, 1] = 0.0
    results.reward[i] = 0.0


@inlined
def asked_ghz(p: Any, action: float) -> float:
    """Clock that an action in [-1, 1] requests, before snapping, GHz.

    Anything outside is clipped. NaN is the highest clock: a rule of safety for whoever calls the
    kernels; environments refuse it.
    """
    if not action <= 1.0:
        action = 1.0
    return p.freq_min_ghz + 0.5 * (max(action, -1.0) + 1.0) * (p.freq_max_ghz - p.freq_min_ghz)


@compiled
def prefill_reset_batch(
    of: Instances, work: OfferedRequests, starts: Starts, how: Encoding, obs: NDArray[np.float32]
) -> None:
    """Start episodes in some rows of the batch and observe."""
    for k in range(starts.rows.size):
        i = starts.rows[k]
        st, p = of.states[i], of.params[i]
        span = Span(starts.begins[k], starts.ends[k])
        prefill_reset(st, of.coefs[i], p, work.requests, span, p.freq_max_ghz)
        observe_prefill(st, p, work.requests, work.cumulative, how.physical)
        encode(how, obs[i])


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
        st, p = of.states[i], of.params[i]
        if st.done == 1:
            rest(st, results, i)
            continue
        freq = asked_ghz(p, actions[i])
        prefill_step(st, of.coefs[i], p, work.requests, work.times, freq)
        write_reward(st, p, results, i)
        observe_prefill(st, p, work.requests, work.cumulative, how.physical)
        encode(how, results.obs[i])


@compiled
def decode_reset_batch(
    of: Instances,
    work: OfferedRequests,
    running: RunningRequests,
    starts: Starts,
    how: Encoding,
    obs: NDArray[np.float32],
) -> None:
    """Start episodes in some rows of the batch and observe."""
    for k in range(starts.rows.size):
        i = starts.rows[k]
        st, p, run = of.states[i], of.params[i], running_of(running, i)
        span = Span(starts.begins[k], starts.ends[k])
        decode_reset(st, of.coefs[i], p, work.requests, work.times, run, span, p.freq_max_ghz)
        observe_decode(st, p, work.requests, work.cumulative, run, how.physical)
        encode(how, obs[i])


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
        st, p = of.states[i], of.params[i]
        if st.done == 1:
            rest(st, results, i)
            continue
        run = running_of(running, i)
        freq = asked_ghz(p, actions[i])
        decode_step(st, of.coefs[i], p, work.requests, work.times, run, freq)
        write_reward(st, p, results, i)
        observe_decode(st, p, work.requests, work.cumulative, run, how.physical)
        encode(how, results.obs[i])
