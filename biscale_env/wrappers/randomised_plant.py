"""Another plant in every episode: ensemble member, actuation delay, SLO (domain randomisation)."""

from typing import Any

import gymnasium as gym
import numpy as np

from biscale_env.core.errors import BiscaleError
from biscale_env.wrappers.last_step import phase_env

Range = tuple[float, float]


def _checked(values: Range, name: str, least: float) -> Range:
    low, high = (float(value) for value in values)
    if not least <= low <= high < np.inf:
        raise BiscaleError(f"{name} must be a range from {least:g} on, got {values}")
    return low, high


class RandomisedPlant(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Chooses the plant of every episode; the workload stays the environment's own choice."""

    def __init__(
        self,
        env: "gym.Env[Any, Any]",
        delay_s: Range | None = (0.0, 0.1),
        slo_scale: Range = (1.0, 1.0),
        nominal_share: float = 0.5,
    ) -> None:
        """Wrap an environment; put it before wrappers that keep what a reset says.

        Args:
            env: of one instance.
            delay_s: range of the actuation delay, s; None keeps that of the member.
            slo_scale: range of a factor on the bound.
            nominal_share: fraction of episodes in the nominal plant; the others take a member of
                the ensemble.

        Raises:
            BiscaleError: an impossible range, or a model without an ensemble.
        """
        gym.utils.RecordConstructorArgs.__init__(
            self, delay_s=delay_s, slo_scale=slo_scale, nominal_share=nominal_share
        )
        super().__init__(env)
        self._inner = phase_env(env, "RandomisedPlant")
        self._delay_s = None if delay_s is None else _checked(delay_s, "delay_s", 0.0)
        self._slo_scale = _checked(slo_scale, "slo_scale", 1e-3)
        if not 0.0 <= nominal_share <= 1.0:
            raise BiscaleError(f"nominal_share must be between 0 and 1, got {nominal_share}")
        if nominal_share < 1.0 and self._inner.plant.model.n_members == 0:
            raise BiscaleError("this model has no ensemble: set nominal_share to 1")
        self._nominal_share = nominal_share
        self._rng = np.random.default_rng()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start the next episode.

        Args:
            seed: restarts the sequences of workloads and of plants; None continues them.
            options: as of the environment; ``member`` is then the plant.
        """
        if seed is not None:
            self._rng = np.random.default_rng([seed, 2])
        rng, plant = self._rng, self._inner.plant
        drawn = int(rng.integers(max(plant.model.n_members, 1)))
        member = -1 if rng.random() < self._nominal_share else drawn
        delay_s = None if self._delay_s is None else rng.uniform(*self._delay_s)
        slo_s = plant.slo.bound_s(plant.phase) * rng.uniform(*self._slo_scale)
        self.env.reset(seed=seed, options={"member": member, **(options or {})})
        changes = {"slo_s": np.array([slo_s])}
        if delay_s is not None:
            changes["delay_s"] = np.array([delay_s])
        return self._inner.restart(changes)
