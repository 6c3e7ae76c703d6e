"""What the shipped agents see and how their output becomes a clock."""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from agents.policy.action_map import ActionMap
from agents.policy.features import FeatureMap, NominalPlants, plants_of, with_price
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.options import real
from biscale_env.envs.single import PhaseEnv
from biscale_env.wrappers.last_step import phase_env

Floats32 = NDArray[np.float32]


class AgentFeatures(
    gym.Wrapper[Floats32, Any, Floats32, Any],
    gym.utils.RecordConstructorArgs,
):
    """The features of :mod:`agents.policy.features`, and a price that the network is told.

    Attributes:
        rule: the rule's action for the present observation, float32 (1,).
        late: requests late even at the highest clock, float32 (1,).
        price: SLO-violation penalty of the episode; None without a range.
    """

    def __init__(self, env: "gym.Env[Any, Any]", price: tuple[float, float] | None = None) -> None:
        """Wrap an environment of one instance with the documented observation.

        Args:
            env: under wrappers that leave the observation as it is.
            price: range of the penalty, in mean energies of a request at max clock, drawn
                log-uniformly per episode unless ``reset(options={"price": ...})`` gives it.

        Raises:
            BiscaleError: another environment, or a range that is none.
        """
        told = None if price is None else [float(value) for value in price]
        gym.utils.RecordConstructorArgs.__init__(self, price=told)
        super().__init__(env)
        self._inner: PhaseEnv = phase_env(env, "AgentFeatures")
        if told is not None and not (len(told) == 2 and 0 < told[0] <= told[1] < np.inf):
            raise BiscaleError(f"price must be a range above 0, got {price}")
        plant = self._inner.plant
        self._map, self._range = FeatureMap(plant.phase, plant.spec), told
        dim = self._map.dim + (told is not None)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (dim,), dtype=np.float32)
        self.price: float | None = None
        self._nominal: dict[int, NominalPlants] = {}
        self._rng = np.random.default_rng()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats32, dict[str, Any]]:
        """Start the next episode; a seed also restarts the prices."""
        given = dict(options or {})
        if seed is not None:
            self._rng = np.random.default_rng([seed, 3])
        if self._range is not None:
            low, high = np.log(self._range)
            drawn = float(np.exp(self._rng.uniform(low, high)))
            self.price = float(real(given.pop("price", drawn), "reset option 'price'"))
            if not self.price > 0:
                raise BiscaleError(f"reset option 'price' must be above 0, got {self.price}")
        observation, info = self.env.reset(seed=seed, options=given or None)
        return self._features(observation, int(info["ensemble_member"])), info

    def step(self, action: Any) -> tuple[Floats32, Any, bool, bool, dict[str, Any]]:
        """One decision."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        features = self._features(observation, int(info["ensemble_member"]))
        return features, reward, terminated, truncated, info

    def _features(self, observation: Floats32, member: int) -> Floats32:
        if member not in self._nominal:
            plant = self._inner.plant
            self._nominal[member] = plants_of(plant, plant.phase, [member])
        features, self.rule, self.late = self._map(observation[None], *self._nominal[member])
        if self.price is not None:
            features = with_price(features, self.price)
        return features[0]


class RuleAction(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """The output of the network becomes a clock: added to the rule's, or itself."""

    def __init__(self, env: "gym.Env[Any, Any]", kind: str = "rule", span: float = 0.5) -> None:
        """Wrap an environment that :class:`AgentFeatures` wraps.

        Args:
            env: gives the rule's action.
            kind: ``rule``, ``clock`` or ``levels``, see :mod:`agents.policy.action_map`.
            span: fraction of the control range that full output spans, with ``rule``.

        Raises:
            BiscaleError: an unknown kind, or no features below.
        """
        gym.utils.RecordConstructorArgs.__init__(self, kind=kind, span=span)
        super().__init__(env)
        if kind not in ("rule", "clock", "levels"):
            raise BiscaleError(f"unknown action '{kind}': choose rule, clock or levels")
        self._features = features_below(env, "RuleAction")
        clocks = phase_env(env, "RuleAction").plant.clocks
        self._map = ActionMap.of(kind, span, clocks)
        self.action_space = (
            gym.spaces.Discrete(len(self._map.levels))
            if kind == "levels"
            else gym.spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)
        )

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One decision."""
        return self.env.step(self._map(np.asarray(action), self._features.rule))


def features_below(env: "gym.Env[Any, Any]", who: str) -> AgentFeatures:
    """The :class:`AgentFeatures` among the wrappers of an environment.

    Raises:
        BiscaleError: there is none.
    """
    inner: Any = env
    while not isinstance(inner, AgentFeatures):
        if not isinstance(inner, gym.Wrapper):
            raise BiscaleError(f"{who} needs AgentFeatures among the wrappers below it")
        inner = inner.env
    return inner
