"""What every clock costs in the present states of a training environment of prefill.

Each row is copied once per clock. The copies meet the same requests, those that the row will meet;
each asks for its clock first and lets the policy decide from then on, up to a horizon and until
what has arrived by then is served::

    cost = energy / reference energy + price x late requests,   (rows, clocks)

The difference between two clocks is then due to them alone: the same requests on both sides take
the luck of arrivals out (common random numbers). It is a single sample of what may come; whoever
fits a function of what is observed to many of them learns the mean.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agents.policy.features import with_price
from agents.training.worlds.training_env import AgentVecEnv
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Act = Callable[[Floats32], NDArray[np.float32]]
"""Network outputs (n,) of features (n, F), without exploration."""

REQUESTS_AHEAD: Final = 2.0
"""A horizon is as long as this many requests take to arrive on average, within its bounds."""


def two_above_0(name: str, values: Any) -> tuple[float, float]:
    """Two numbers above 0.

    Raises:
        BiscaleError: they are not.
    """
    try:
        first, second = (float(value) for value in values)
        if first > 0.0 and second > 0.0:
            return first, second
    except (TypeError, ValueError):
        pass
    raise BiscaleError(f"policy_iteration: {name} must be two numbers above 0, got {values}")


def check_tries(clocks: Any, horizon_s: Any) -> tuple[float, float]:
    """Shortest and longest horizon, s, where both parameters are possible.

    Raises:
        BiscaleError: fewer than two clocks, or an impossible horizon.
    """
    if not isinstance(clocks, int) or clocks < 2:
        raise BiscaleError(
            f"policy_iteration: clocks must be a whole number from 2 on, got {clocks}"
        )
    low, high = two_above_0("horizon_s", horizon_s)
    if low > high:
        raise BiscaleError(
            f"policy_iteration: horizon_s must be [shortest, longest], got {horizon_s}"
        )
    return low, high


class ClockCosts:
    """Runs the copies.

    Attributes:
        actions: the clocks, as actions in [-1, 1], (clocks,), rising.
        horizon_s: of each group, s, (groups,).
        map: from the network's outputs to actions.
    """

    def __init__(self, env: AgentVecEnv, clocks: int, horizon_s: Sequence[float]) -> None:
        """Allocate the copies.

        Args:
            env: whose rows are copied; a training environment of prefill.
            clocks: how many, evenly spread over the control range.
            horizon_s: shortest and longest horizon, s.

        Raises:
            BiscaleError: decode, no penalty to tell the network, fewer than two clocks, an
                impossible horizon, or episodes that are no longer than it.
        """
        if env.config.phase != "prefill":
            raise BiscaleError(
                "policy_iteration is for prefill: what a clock costs in decode shows only when "
                "all requests that run are finished"
            )
        if env.config.price is None:
            raise BiscaleError(
                "policy_iteration needs a range of penalties: give price: [low, high] in the config"
            )
        low, high = check_tries(clocks, horizon_s)
        rate_rps = np.array([group.source.rate_rps for group in env.groups])
        self.actions = np.linspace(-1.0, 1.0, clocks, dtype=np.float32)
        self.horizon_s = np.clip(REQUESTS_AHEAD / rate_rps, low, high)
        for group, seconds in zip(env.groups, self.horizon_s.tolist(), strict=True):
            if group.source.episode_s <= seconds:
                raise BiscaleError(
                    f"policy_iteration: episodes of {group.name} last {group.source.episode_s:g} s,"
                    f" no longer than the horizon of {seconds:g} s: give longer ones (episode_s)"
                    " or a shorter horizon_s"
                )
        self.map = env.actions
        self._env, self._copy_of = env, np.repeat(np.arange(env.num_envs), clocks)
        self._batch = Batch(env.plant, len(self._copy_of), env.workloads.table)

    def __call__(self, act: Act) -> tuple[Floats, NDArray[np.bool_]]:
        """Costs in the present states, which are left as they are.

        Args:
            act: the policy that goes on after the first decision.

        Returns:
            Costs (n, clocks), and which rows count, (n,): those whose episode does not end within
            the horizon.
        """
        env, batch, of = self._env, self._batch, self._copy_of
        end_s = env.batch.states["time_s"] + self.horizon_s[env.group]
        whole = end_s < env.batch.params["end_s"]
        self._copy(end_s)
        energy_j, late = np.zeros(len(of)), np.zeros(len(of))
        action = np.tile(self.actions, env.num_envs)
        price, known = env.price[of], env._known[of]
        while True:
            batch.step(action)
            energy_j += batch.told.energy_j
            late += batch.told.cost
            if batch.done.all():
                break
            features, rule, _ = env.features(batch.obs, batch.coefs, known)
            output = act(with_price(features, price))
            action = np.ascontiguousarray(env.actions(output, rule), dtype=np.float32)
        shape = (env.num_envs, len(self.actions))
        cost_j = energy_j.reshape(shape) + self._waiting_j(batch.states["time_s"].reshape(shape))
        ref_j = env.plants.energy_ref_j[env.group]
        weight = env.violation_weight()
        return cost_j / ref_j[:, None] + weight[:, None] * late.reshape(shape), whole

    def _copy(self, end_s: Floats) -> None:
        """Copy the rows; none meets what arrives after ``end_s``."""
        env, batch, of = self._env, self._batch, self._copy_of
        source, arrivals = env.batch, env.workloads.table.arrival_s
        batch.states[:], batch.coefs[:] = source.states[of], source.coefs[of]
        batch.params[:] = source.params[of]
        ends = [
            tail + int(np.searchsorted(arrivals[tail:last], until, side="right"))
            for tail, last, until in zip(
                source.states["tail"].tolist(), source.states["end"].tolist(), end_s, strict=True
            )
        ]
        batch.states["end"] = np.array(ends)[of]
        batch.params["end_s"] = end_s[of]
        batch.params["drain"] = 1

    def _waiting_j(self, ended_s: Floats) -> Floats:
        """Energy until the last copy of a row has ended, idle at the cheapest clock, J."""
        env = self._env
        idle_w = env.shaper.baseline[env.group, env.member + 1, 1]
        return np.asarray(idle_w[:, None] * (ended_s.max(axis=1, keepdims=True) - ended_s))
