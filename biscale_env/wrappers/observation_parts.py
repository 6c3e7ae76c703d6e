"""Observations made of named parts, as one vector or as a dictionary.

A part is a function of the documented observation, so it works on a policy's input as well as in an
environment, for one row or for many.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from biscale_env.contract.observation import HORIZON, ObservationSpec
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant
from biscale_env.envs.vector import PhaseVectorEnv
from biscale_env.wrappers.last_step import phase_env

Floats32 = NDArray[np.float32]


class Seen:
    """Observations of one phase with their physical values by name, for any leading shape."""

    def __init__(self, observation: Floats32, plant: Plant) -> None:
        """Look at encoded observations, ``(..., dim)``, of a plant."""
        self.observation, self.plant = observation, plant
        self.spec: ObservationSpec = plant.spec

    def value(self, name: str) -> NDArray[np.float64]:
        """Physical value of a feature, ``(...)``."""
        return self.spec.value(self.observation, name)

    def horizon(self, name: str) -> NDArray[np.float64]:
        """Physical values of a projected quantity, ``(..., HORIZON)``."""
        return self.spec.horizon(self.observation, name)


@dataclass(frozen=True)
class ObservationPart:
    """One named part of an observation.

    Attributes:
        name: key, or heading.
        meaning: one line for tables, with the unit.
        value: from what is seen to numbers ``(...)``, or ``(..., size)`` with a size above 1.
        low: lower bound; values are clipped to it.
        high: upper bound.
        size: numbers in it.
    """

    name: str
    meaning: str
    value: Callable[[Seen], Any]
    low: float = -np.inf
    high: float = np.inf
    size: int = 1

    def read(self, seen: Seen) -> Floats32:
        """Numbers of this part, float32 ``(..., size)``.

        Raises:
            BiscaleError: the function gave another shape.
        """
        lead = seen.observation.shape[:-1]
        made = np.asarray(self.value(seen), dtype=np.float64)
        if made.shape == lead and self.size == 1:
            made = made[..., None]
        if made.shape != (*lead, self.size):
            raise BiscaleError(
                f"observation part '{self.name}' has shape {made.shape}, but its size is "
                f"{self.size} for observations of shape {seen.observation.shape}"
            )
        return np.clip(made, self.low, self.high).astype(np.float32)


class NamedParts:
    """Observations to their named parts, in one vector or a dictionary."""

    def __init__(self, parts: Sequence[ObservationPart], plant: Plant, as_dict: bool) -> None:
        """Check the names.

        Raises:
            BiscaleError: no part, or one name twice.
        """
        self.parts, self.plant, self.as_dict = tuple(parts), plant, as_dict
        names = [part.name for part in self.parts]
        if not names or len(set(names)) < len(names):
            raise BiscaleError(f"an observation needs parts of different names, got {names}")

    @property
    def space(self) -> gym.Space[Any]:
        """Space of one observation."""
        boxes: dict[str, gym.Space[Any]] = {
            part.name: gym.spaces.Box(part.low, part.high, (part.size,), dtype=np.float32)
            for part in self.parts
        }
        if self.as_dict:
            return gym.spaces.Dict(boxes)
        low, high = (
            np.concatenate([np.full(part.size, bound(part)) for part in self.parts])
            for bound in (lambda part: part.low, lambda part: part.high)
        )
        return gym.spaces.Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)

    def __call__(self, observation: Floats32) -> Any:
        """Parts of encoded observations ``(..., dim)``."""
        seen = Seen(observation, self.plant)
        read = {part.name: part.read(seen) for part in self.parts}
        return read if self.as_dict else np.concatenate(list(read.values()), axis=-1)


def _whole_plant(env: "gym.Env[Any, Any]", who: str) -> Plant:
    plant = phase_env(env, who).plant
    if getattr(env.observation_space, "shape", None) != (plant.spec.dim,):
        raise BiscaleError(
            f"{who} reads the documented observation ({plant.spec.dim},): put it before other "
            f"wrappers, got {env.observation_space}"
        )
    return plant


class NamedObservation(
    gym.ObservationWrapper[Any, Any, Any],
    gym.utils.RecordConstructorArgs,
):
    """Parts of one's own instead of the documented vector."""

    def __init__(
        self,
        env: "gym.Env[Any, Any]",
        parts: Sequence[ObservationPart],
        as_dict: bool = False,
    ) -> None:
        """Wrap an environment.

        Args:
            env: of one instance, with the documented observation.
            parts: in order.
            as_dict: a dictionary of ``(size,)`` arrays instead of one vector.

        Raises:
            BiscaleError: another environment, no part, or one name twice.
        """
        gym.utils.RecordConstructorArgs.__init__(
            self, _disable_deepcopy=True, parts=parts, as_dict=as_dict
        )
        super().__init__(env)
        self.read = NamedParts(parts, _whole_plant(env, type(self).__name__), as_dict)
        self.observation_space = self.read.space

    def observation(self, observation: Floats32) -> Any:
        """Parts of one observation."""
        return self.read(observation)


class NamedVectorObservation(gym.vector.VectorWrapper):
    """The same for the native vector environment, ``final_obs`` included."""

    def __init__(
        self, env: PhaseVectorEnv, parts: Sequence[ObservationPart], as_dict: bool = False
    ) -> None:
        """Wrap a vector environment; see :class:`NamedObservation`.

        Raises:
            BiscaleError: not the native vector environment, no part, or one name twice.
        """
        super().__init__(env)
        inner = env.unwrapped
        if not isinstance(inner, PhaseVectorEnv):
            raise BiscaleError(
                "NamedVectorObservation needs the native vector environment (gym.make_vec of an "
                f"environment of one instance), got {type(inner).__name__}"
            )
        self.read = NamedParts(parts, inner.plant, as_dict)
        self.single_observation_space = self.read.space
        self.observation_space = gym.vector.utils.batch_space(self.read.space, self.num_envs)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start episodes."""
        observation, infos = self.env.reset(seed=seed, options=options)
        return self.read(observation), infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One decision in every environment."""
        observation, reward, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos:
            last = np.empty(self.num_envs, dtype=object)
            for i in np.flatnonzero(infos["_final_obs"]):
                last[i] = self.read(infos["final_obs"][i])
            infos = {**infos, "final_obs": last}
        return self.read(observation), reward, terminated, truncated, infos


def documented_parts(spec: ObservationSpec) -> list[ObservationPart]:
    """The documented observation by name, encoded: projected quantities have ``HORIZON`` numbers.

    A part's numbers, one behind the other, are the vector itself.
    """
    parts, at = [], 0
    while at < spec.dim:
        feature = spec.features[at]
        size = HORIZON if feature.name.endswith("_0") else 1
        name = feature.name.removesuffix("_0")
        unit = f"{feature.meaning.removeprefix('batch 0: ')}, {feature.unit} / {feature.scale:g}"
        value = _slice(at, size)
        parts.append(ObservationPart(name, unit, value, feature.low, feature.high, size))
        at += size
    return parts


def _slice(at: int, size: int) -> Callable[[Seen], Any]:
    return lambda seen: seen.observation[..., at : at + size]


class DictObservation(NamedObservation):
    """The documented observation as a dictionary by name."""

    def __init__(self, env: "gym.Env[Any, Any]") -> None:
        """Wrap an environment of one instance."""
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env, documented_parts(phase_env(env, "DictObservation").plant.spec), True)
