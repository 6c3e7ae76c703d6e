"""What the last decision of an environment did, by name and in physical units."""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import REWARD_TERMS
from biscale_env.envs.plant import Plant
from biscale_env.envs.single import PhaseEnv


def phase_env(env: "gym.Env[Any, Any]", who: str) -> PhaseEnv:
    """The environment of one instance under any wrappers.

    Raises:
        BiscaleError: it is another one.
    """
    inner = env.unwrapped
    if not isinstance(inner, PhaseEnv):
        raise BiscaleError(
            f"{who} needs an environment of one instance (BiScale/Prefill-v1, BiScale/Decode-v1, "
            f"...), got {type(inner).__name__}"
        )
    return inner


@dataclass(frozen=True)
class LastStep:
    """One step of one instance.

    Attributes:
        plant: models, SLO, clocks and settings.
        observation: encoded, as the environment gave it, float32 (dim,).
        terms: parts of the environment's own reward: ``energy``, ``slo``.
        dt_s: length, waiting included, s.
        busy_s: part of it in which iterations ran, s.
        energy_j: energy of the instance, waiting included, J.
        idle_energy_j: part of it while it waited, J.
        tokens: GEMM rows of its (last) batch.
        finished: requests that were finished.
        violations: those of them that missed the SLO.
        freq_mhz: mean clock while busy, MHz.
        requested_mhz: clock that is asked for now, MHz.
        requested_before_mhz: clock that was asked for before the step, MHz.
    """

    plant: Plant
    observation: NDArray[np.float32]
    terms: dict[str, float]
    dt_s: float
    busy_s: float
    energy_j: float
    idle_energy_j: float
    tokens: int
    finished: int
    violations: int
    freq_mhz: float
    requested_mhz: float
    requested_before_mhz: float

    def value(self, name: str) -> float:
        """Physical value of a feature of the observation, in its unit."""
        return float(self.plant.spec.value(self.observation, name))


def requested_mhz(env: PhaseEnv) -> float:
    """Clock that an environment asks for now, MHz."""
    return float(env.batch.states["requested_ghz"][0]) * 1e3


def last_step(env: PhaseEnv, requested_before_mhz: float) -> LastStep:
    """Read the records of an environment after a step.

    Args:
        env: the environment itself.
        requested_before_mhz: :func:`requested_mhz` before the step.
    """
    batch = env.batch
    st = batch.states[0]
    return LastStep(
        plant=env.plant,
        observation=batch.obs[0].copy(),
        terms=dict(zip(REWARD_TERMS, batch.terms[0].tolist(), strict=True)),
        dt_s=float(st["time_s"] - st["step_start_s"]),
        busy_s=float(st["step_duration_s"]),
        energy_j=float(st["step_energy_j"]),
        idle_energy_j=float(st["step_energy_idle_j"]),
        tokens=int(st["step_tokens"]),
        finished=int(st["step_finished"]),
        violations=int(st["step_violations"]),
        freq_mhz=float(st["step_freq_mean_ghz"]) * 1e3,
        requested_mhz=float(st["requested_ghz"]) * 1e3,
        requested_before_mhz=requested_before_mhz,
    )
