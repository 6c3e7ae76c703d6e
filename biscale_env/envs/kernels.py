"""Compiled steps of a batch of instances.

Transition, reward, cost and observation in one pass over the records.
"""

from typing import Any

import numpy as np

from biscale_env.core.jit import compiled, inlined
from biscale_env.envs.observe import encode, observe_decode, observe_prefill
from biscale_env.sim.clock import begin_step
from biscale_env.sim.decode import decode_reset, decode_step
from biscale_env.sim.prefill import prefill_reset, prefill_step


@inlined
def reward_terms(st: Any, p: Any) -> Any:
    """The two dimensionless parts of the reward of the last step: ``(energy term, SLO term)``.

    The reward is their sum.
    """
    return -st.step_energy_j / p.energy_ref_j, -p.violation_weight * st.step_violations


@inlined
def write_reward(st: Any, p: Any, reward: Any, terms: Any, i: int) -> None:
    """Put the reward and its parts into row ``i``."""
    energy_term, slo_term = reward_terms(st, p)
    terms[i, 0] = energy_term
    terms[i, 1] = slo_term
    reward[i] = energy_term + slo_term


@inlined
def rest(st: Any, reward: Any, terms: Any, i: int) -> None:
    """A row whose episode is over does and earns nothing."""
    begin_step(st)
    terms[i, 0] = 0.0
    terms[i, 1] = 0.0
    reward[i] = 0.0


@inlined
def asked_ghz(p: Any, action: float) -> float:
    """Clock that an action in [-1, 1] asks for, before snapping, GHz.

    Anything outside is clipped, NaN is the highest clock.
    """
    if not action <= 1.0:
        action = 1.0
    return p.freq_min_ghz + 0.5 * (max(action, -1.0) + 1.0) * (p.freq_max_ghz - p.freq_min_ghz)


@compiled
def prefill_reset_batch(
    rows: Any, states: Any, coefs: Any, params: Any, arrival_s: Any, prompt: Any, cumulative: Any, begins: Any, ends: Any,
    scale: Any, low: Any, high: Any, physical: Any, obs: Any,
) -> None:  # fmt: skip
    """Start episodes in the given rows of the batch and observe."""
    for k in range(rows.size):
        i = rows[k]
        prefill_reset(
            states[i],
            coefs[i],
            params[i],
            arrival_s,
            prompt,
            begins[k],
            ends[k],
            params[i].freq_max_ghz,
        )
        observe_prefill(states[i], params[i], arrival_s, prompt, cumulative, physical)
        encode(physical, scale, low, high, obs[i])


@compiled
def prefill_step_batch(
    states: Any, coefs: Any, params: Any, arrival_s: Any, prompt: Any, cumulative: Any, first_token_s: Any, actions: Any,
    scale: Any, low: Any, high: Any, physical: Any, obs: Any, reward: Any, terms: Any,
) -> None:  # fmt: skip
    """One decision in every row that is not done; rows that are done rest."""
    for i in range(states.size):
        if states[i].done == 1:
            rest(states[i], reward, terms, i)
            continue
        freq = asked_ghz(params[i], actions[i])
        prefill_step(states[i], coefs[i], params[i], arrival_s, prompt, first_token_s, freq)
        write_reward(states[i], params[i], reward, terms, i)
        observe_prefill(states[i], params[i], arrival_s, prompt, cumulative, physical)
        encode(physical, scale, low, high, obs[i])


@compiled
def decode_reset_batch(
    rows: Any, states: Any, coefs: Any, params: Any, arrival_s: Any, prompt: Any, output: Any, cumulative: Any, start_s: Any,
    slots: Any, ring: Any, tree: Any, stack: Any, begins: Any, ends: Any, scale: Any, low: Any, high: Any, physical: Any, obs: Any,
) -> None:  # fmt: skip
    """Start episodes in the given rows of the batch and observe."""
    for k in range(rows.size):
        i = rows[k]
        decode_reset(
            states[i], coefs[i], params[i], arrival_s, prompt, output, start_s, slots[i], ring[i], tree[i], stack[i],
            begins[k], ends[k], params[i].freq_max_ghz,
        )  # fmt: skip
        observe_decode(
            states[i], params[i], arrival_s, prompt, cumulative, tree[i], stack[i], physical
        )
        encode(physical, scale, low, high, obs[i])


@compiled
def decode_step_batch(
    states: Any, coefs: Any, params: Any, arrival_s: Any, prompt: Any, output: Any, cumulative: Any, start_s: Any, finish_s: Any,
    slots: Any, ring: Any, tree: Any, stack: Any, actions: Any, scale: Any, low: Any, high: Any, physical: Any, obs: Any,
    reward: Any, terms: Any,
) -> None:  # fmt: skip
    """One decision in every row that is not done; rows that are done rest."""
    for i in range(states.size):
        if states[i].done == 1:
            rest(states[i], reward, terms, i)
            continue
        freq = asked_ghz(params[i], actions[i])
        decode_step(
            states[i], coefs[i], params[i], arrival_s, prompt, output, start_s, finish_s, slots[i], ring[i], tree[i], stack[i],
            freq,
        )  # fmt: skip
        write_reward(states[i], params[i], reward, terms, i)
        observe_decode(
            states[i], params[i], arrival_s, prompt, cumulative, tree[i], stack[i], physical
        )
        encode(physical, scale, low, high, obs[i])


def ring_size(longest_output: int) -> int:
    """Slots of the finish ring: the next power of two above the longest output, so that no two laps
    meet.
    """
    return int(2 ** np.ceil(np.log2(longest_output + 2)))
