"""A reward made of named terms, which a user replaces or adds to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import gymnasium as gym
from numpy.typing import NDArray

from biscale_env.config.loader import nearest
from biscale_env.core.errors import BiscaleError
from biscale_env.wrappers.last_step import LastStep, last_step, phase_env, requested_mhz


@dataclass(frozen=True)
class RewardTerm:
    """One part of a reward.

    Attributes:
        name: key in ``info["reward_terms"]``.
        meaning: one line for tables.
        value: from what a step did to a number.
        weight: factor on it.
    """

    name: str
    meaning: str
    value: Callable[[LastStep], float]
    weight: float = 1.0

    def times(self, weight: float) -> "RewardTerm":
        """The same term with another weight."""
        return replace(self, weight=weight)


def _energy(step: LastStep) -> float:
    return step.terms["energy"]


def _slo(step: LastStep) -> float:
    return step.terms["slo"]


def _misses(step: LastStep) -> float:
    return -float(step.violations)


def _clock_change(step: LastStep) -> float:
    clocks = step.plant.clocks
    span = clocks.freq_max_mhz - clocks.freq_min_mhz
    return -abs(step.requested_mhz - step.requested_before_mhz) / span


def _busy_energy(step: LastStep) -> float:
    return -(step.energy_j - step.idle_energy_j) / step.plant.energy_ref_j


def _waiting(step: LastStep) -> float:
    name = "queue_requests" if step.plant.phase == "prefill" else "waiting_requests"
    return -step.value(name) * step.dt_s


TERMS: Final = {
    term.name: term
    for term in (
        RewardTerm("energy", "minus energy in reference energies", _energy),
        RewardTerm("slo", "minus `violation_weight` per request that missed the SLO", _slo),
        RewardTerm("misses", "minus requests that missed the SLO", _misses),
        RewardTerm("busy_energy", "minus energy while iterations run", _busy_energy),
        RewardTerm(
            "clock_change", "minus the change of the clock asked for, over the range", _clock_change
        ),
        RewardTerm("waiting", "minus waiting requests times the length of the step, s", _waiting),
    )
}
OWN_TERMS: Final = ("energy", "slo")  # what the environments' own reward consists of


def term_of(given: RewardTerm | str) -> RewardTerm:
    """A term, or the one of this name.

    Raises:
        BiscaleError: there is no such term.
    """
    if isinstance(given, RewardTerm):
        return given
    if given not in TERMS:
        near = nearest(given, TERMS)
        hint = f"; the nearest is '{near}'" if near else ""
        raise BiscaleError(f"there is no reward term '{given}'{hint}; terms: {', '.join(TERMS)}")
    return TERMS[given]


class NamedReward(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """The sum of named terms instead of the environment's own reward.

    ``info["reward_terms"]`` tells each, weighted. The default terms are the environment's own
    reward.
    """

    def __init__(
        self, env: "gym.Env[Any, Any]", terms: Sequence[RewardTerm | str] = OWN_TERMS
    ) -> None:
        """Wrap an environment.

        Args:
            env: of one instance, under any wrappers.
            terms: terms of one's own, or names of :data:`TERMS`.

        Raises:
            BiscaleError: another environment, no term, an unknown name, or one name twice.
        """
        self.terms = [term_of(term) for term in terms]
        told = [term.name if TERMS.get(term.name) == term else term for term in self.terms]
        gym.utils.RecordConstructorArgs.__init__(self, _disable_deepcopy=True, terms=told)
        super().__init__(env)
        self._inner = phase_env(env, type(self).__name__)
        names = [term.name for term in self.terms]
        if not names or len(set(names)) < len(names):
            raise BiscaleError(f"a reward needs terms of different names, got {names}")

    def step(self, action: Any) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """One decision, paid by the terms."""
        before = requested_mhz(self._inner)
        observation, _, terminated, truncated, info = self.env.step(action)
        done = last_step(self._inner, before)
        parts = {term.name: float(term.weight * term.value(done)) for term in self.terms}
        told = {**info, "reward_terms": parts}
        return observation, sum(parts.values()), terminated, truncated, told
