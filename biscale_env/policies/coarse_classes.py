"""Policies of the coarse loop from outside: ``module:Class`` and ``file.py:Class``.

A class needs ``place(observation, memory)`` (``controllers.placement.coarse_rules.CoarsePolicy``)
or ``predict`` as Stable-Baselines3 has it, whose action is the index of one of the environment's
placements. It is given the environment if its first parameter is called ``env``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.config.cluster_layout import Placement
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_env import ClusterEnv
from biscale_env.policies.class_source import construct, load_class, named_parameters
from controllers.placement.coarse_rules import CoarseMemory, CoarsePolicy, remembered
from controllers.registry import check_parameters, parse_parameters


class PredictedPlacements:
    """Placements by the index that ``predict`` gives."""

    def __init__(self, policy: Any, env: ClusterEnv, name: str) -> None:
        """Take a policy with ``predict`` for an environment."""
        self._policy, self._env, self._name = policy, env, name
        self._state: Any = None

    def place(
        self, observation: NDArray[np.float32], memory: CoarseMemory | None
    ) -> tuple[Placement, CoarseMemory]:
        """See :class:`controllers.placement.coarse_rules.CoarsePolicy`.

        Raises:
            BiscaleError: an action that is no placement.
        """
        begins = np.array([memory is None])
        state = None if memory is None else self._state
        action, self._state = self._policy.predict(
            observation, state=state, episode_start=begins, deterministic=True
        )
        index, placements = int(np.ravel(action)[0]), self._env.placements
        if not 0 <= index < len(placements):
            raise BiscaleError(
                f"policy '{self._name}' chose placement {index}, but there are 0 to "
                f"{len(placements) - 1}"
            )
        return placements[index], CoarseMemory(remembered(observation, memory), placements[index])


def coarse_from_class(name: str, base: str, rest: str, env: ClusterEnv) -> CoarsePolicy:
    """Make a coarse policy of a class from outside.

    Args:
        name: the whole name.
        base: ``module:Class`` or ``file.py:Class``.
        rest: its parameters as text.
        env: the environment, unwrapped.

    Raises:
        BiscaleError: no such class, an unknown parameter, or an object that cannot decide.
    """
    maker: Callable[..., Any] = load_class(base)
    known = [p.name for p in named_parameters(maker)]
    takes_env = known[:1] == ["env"]
    given = parse_parameters(name, rest, getattr(maker, "positional", None))
    checked = check_parameters(maker, name, given, known[takes_env:])
    made = construct(maker, name, [env] if takes_env else [], checked)
    if callable(getattr(made, "place", None)):
        return made  # type: ignore[no-any-return]
    if callable(getattr(made, "predict", None)):
        return PredictedPlacements(made, env, name)
    raise BiscaleError(
        f"policy '{name}' has neither place(observation, memory) nor predict(observation, state, "
        "episode_start, deterministic)"
    )
