"""A teacher with foresight in the student's own states: plans that know the next seconds.

DAgger with the hindsight optimum, delay included: whatever the student did, the remaining programme
is solved from there for what waits and what arrives within the horizon
(:mod:`controllers.oracle.lookahead`). The student sees no future; it learns the mean over what may
come.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from agents.training.worlds.training_env import AgentVecEnv
from biscale_env.core.errors import BiscaleError
from controllers.oracle.lookahead import LookaheadPlanner, PlanWeights
from controllers.registry import check_parameters, parse_parameters

Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class LookaheadTeacher:
    """Plans from any state of a training environment of prefill."""

    def __init__(self, name: str, env: AgentVecEnv) -> None:
        """Take what the plans know and how they weigh lateness.

        Args:
            name: ``lookahead`` with ``seconds``, the horizon; ``price`` and ``reserve`` of
                :class:`controllers.oracle.lookahead.PlanWeights`.
            env: whose states are labelled.

        Raises:
            BiscaleError: decode, an unknown parameter or an impossible value.
        """
        if env.config.phase != "prefill":
            raise BiscaleError("the teacher lookahead is for prefill: decode has no such plans")
        given = parse_parameters(name, name.partition(":")[2], "seconds")
        known = ["seconds", "price", "reserve"]
        self.seconds, self.weights = _settings(**check_parameters(_settings, name, given, known))
        self._env, self._planners = env, dict[int, LookaheadPlanner]()

    def __call__(self, obs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Actions in [-1, 1], (n,), in the present states of the environment.

        Args:
            obs: the encoded observations; only their number matters.
        """
        env, out = self._env, np.empty(len(obs), dtype=np.float32)
        begins = env.workloads.table.begins
        for row, number in enumerate(env.workload.tolist()):
            planner = self._planner(number)
            state = env.batch.states[row].copy()
            for name in ("head", "tail"):  # in the table of all workloads
                state[name] -= begins[number]
            for name in ("delay_s", "slo_s"):  # of this episode
                planner.params[name] = env.batch.params[name][row]
            plan = planner.plan(state, self.weights)
            clocks = planner.plant.clocks
            freq = float(plan[0]) if len(plan) else clocks.freq_max_mhz
            out[row] = clocks.to_action(np.array([freq]))[0]
        return out

    def _planner(self, number: int) -> LookaheadPlanner:
        """The planner of a workload; all share the arrays that a plan is solved in."""
        if number not in self._planners:
            first = self._env.workloads.first
            group = int(np.searchsorted(first, number, side="right")) - 1
            mine = self._env.groups[group]
            trace = mine.source.workload(number - int(first[group]))
            known = next(iter(self._planners.values()), None)
            self._planners[number] = LookaheadPlanner(mine.plant, trace, self.seconds, share=known)
        return self._planners[number]


def _settings(
    seconds: Amount = 0.5, price: Amount = 12.0, reserve: Share = 0.2
) -> tuple[float, PlanWeights]:
    """Horizon and weights; the defaults are what docs/agents.md measures."""
    return seconds, PlanWeights(price, reserve)
