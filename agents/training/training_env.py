"""The native batch as SB3's ``VecEnv`` for training.

Features in, learned action out, randomised plants, a constraint per group.

The reward is that of the environments with changes that leave the best policy the same. (a) What no
policy can change is taken off: the marginal energy per token and idle power per second at the
cheapest clock; without it, the size of the next batch is most of the variance. (b) Potential-based
shaping: a request is charged when it is lost even at the highest clock, not when it completes late.
(c) Prefill: requests that max clock loses on the same workload are refunded when they arrive. They
are the same for every policy, and most of all violations. (d) Every second earns the average cost
rate of its group (and price): decisions differ in length, and without it a discounted sum prefers
short steps, that is high clocks (the differential reward of average-reward learning). (e) Rewards
are divided by the spread of their group.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from agents.policy.features import FeatureMap, with_price
from agents.training.mixture import HELD_OUT, WorkloadGroup, plant_of, run_at_max
from agents.training.train_config import AgentConfig
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.models.physics import idle_power_w

Floats = NDArray[np.float64]
NOTHING: dict[str, Any] = {}
PRICE_BINS = 4
SPREAD_MEMORY = 0.9995  # per step: some thousand steps
# two typical iterations of each phase (assumed); their difference is what one more token costs
MARGINAL_WORK = {
    "prefill": ((1024.0, 1024.0**2 / 2, 0.0, 1.0), (2048.0, 1024.0**2, 0.0, 2.0)),
    "decode": ((64.0, 0.0, 64.0 * 1024, 64.0), (256.0, 0.0, 256.0 * 1024, 256.0)),
}


class Tally:
    """Sums since the last reading: per group, requests finished and lost in the nominal plant.

    Per cell, cost and time.

    Cost is in reference energies, time in s.
    """

    def __init__(self, n_groups: int, n_cells: int) -> None:
        """Start from nothing."""
        self.finished, self.lost = np.zeros(n_groups), np.zeros(n_groups)
        self.cost, self.time_s = np.zeros(n_cells), np.zeros(n_cells)

    def add(
        self,
        group: NDArray[np.int64],
        cell: NDArray[np.int64],
        counted: NDArray[np.bool_],
        finished: Floats,
        lost: Floats,
        cost: Floats,
        time_s: Floats,
    ) -> None:
        """Count one step of all rows; requests only of the rows that are counted."""
        n, cells = len(self.finished), len(self.cost)
        self.finished += np.bincount(group[counted], finished[counted], n)
        self.lost += np.bincount(group[counted], lost[counted], n)
        self.cost += np.bincount(cell, cost, cells)
        self.time_s += np.bincount(cell, time_s, cells)


class Spread:
    """Root mean square of the reward per cell, running.

    Groups with few violations then count as much as those with many.
    """

    def __init__(self, n_cells: int) -> None:
        """Start at 1 with a little weight."""
        self.squares, self.weight = np.full(n_cells, 10.0), np.full(n_cells, 10.0)

    def __call__(self, cell: NDArray[np.int64], values: Floats) -> Floats:
        """Take in the values of one step and return the spread of each one's cell."""
        n = len(self.squares)
        self.squares = SPREAD_MEMORY * self.squares + np.bincount(cell, values**2, n)
        self.weight = SPREAD_MEMORY * self.weight + np.bincount(cell, minlength=n)
        return np.sqrt(self.squares / self.weight)[cell] + 1e-3


class AgentVecEnv(VecEnv):
    """n randomised plants of one phase, stepped by one compiled call.

    Attributes:
        multipliers: reward lost per violation, one per group; the Lagrangian moves them (unless
            there is a price).
        cost_rate: average cost per second, one per cell (group and bin of prices); the Lagrangian
            measures it.
        request_cost: unit of the price per group.
        tally: what happened per group since it was last replaced, in episodes of the nominal plant
            if there are any: the constraint is stated there, other members may be slower than any
            policy can make up for.
    """

    def __init__(
        self,
        config: AgentConfig,
        groups: Sequence[WorkloadGroup],
        counts: Sequence[int],
        seed: int,
        held_out: bool = False,
    ) -> None:
        """Make all workloads once.

        Args:
            config: the run.
            groups: families at loads.
            counts: workloads per group.
            seed: of the choice of episodes.
            held_out: take the held-out workloads (see :mod:`agents.training.heldout`).
        """
        self.config, self.groups = config, list(groups)
        self.plant = plant_of(config)
        first = HELD_OUT if held_out else 0
        owned = [
            (g, g.source.workload(first + k))
            for g, n in zip(groups, counts, strict=True)
            for k in range(n)
        ]
        self.pool = RequestTable.of(self.plant, [trace for _, trace in owned])
        at_max = [run_at_max(g, trace) for g, trace in owned]
        lost = [late for late, _ in at_max]
        self.lost_at_max = [
            np.concatenate([x for (h, _), x in zip(owned, lost, strict=True) if h is g])
            for g in self.groups
        ]
        refunds = (
            np.concatenate(lost)
            if config.phase == "prefill"
            else np.zeros(len(self.pool.arrival_s))
        )
        self.request_cost = self._request_cost([g for g, _ in owned], at_max)
        self._refunds = np.concatenate([[0.0], np.cumsum(refunds)])
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.batch = Batch(self.plant, config.n_envs, self.pool)
        self.features = FeatureMap(config.phase, self.plant.spec, self.plant.clocks)
        self.multipliers = np.full(len(self.groups), config.constraint.start)
        self.cost_rate = np.zeros(len(self.groups) * PRICE_BINS)
        self.tally = self.new_tally()
        self._members = np.arange(-1, self.plant.model.n_members)
        beliefs = [self.features.nominal_model(g.plant.model, self._members) for g in self.groups]
        self._coefs = np.stack([b[0] for b in beliefs])
        self._cheapest = np.stack([b[1] for b in beliefs])
        self._capacity = np.array([g.plant.kv_capacity_tokens for g in self.groups])
        self._baseline = np.array(
            [
                [
                    self._baseline_of(g, int(d), f)
                    for d, f in zip(self._members, mine[1], strict=True)
                ]
                for g, mine in zip(self.groups, beliefs, strict=True)
            ]
        )
        n = config.n_envs
        self.price = np.full(n, config.constraint.start)
        self._spread = Spread(len(self.groups) * PRICE_BINS)
        self.group, self.member = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        self._nominal = config.randomise.nominal_share > 0.0
        self.rng = np.random.default_rng(seed)
        self._actions: NDArray[Any] = np.zeros(n, dtype=np.float32)
        self.levels = self.plant.clocks.to_action(np.array(self.plant.clocks.levels_mhz))
        self.dim = self.features.dim + (config.price is not None)
        space = gym.spaces.Box(-np.inf, np.inf, (self.dim,), dtype=np.float32)
        action: gym.Space[Any] = gym.spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)
        super().__init__(
            n, space, gym.spaces.Discrete(len(self.levels)) if config.action == "levels" else action
        )

    def new_tally(self) -> Tally:
        """An empty tally of this environment."""
        return Tally(len(self.groups), len(self.groups) * PRICE_BINS)

    def _request_cost(
        self, owners: list[WorkloadGroup], at_max: list[tuple[NDArray[np.bool_], float]]
    ) -> Floats:
        """Mean energy of a request at max clock per group, idle included, in reference energies.

        The unit of the price.
        """
        energy, requests = np.zeros(len(self.groups)), np.zeros(len(self.groups))
        for group, (late, energy_j) in zip(owners, at_max, strict=True):
            energy[self.groups.index(group)] += energy_j
            requests[self.groups.index(group)] += len(late)
        return energy / np.maximum(requests, 1.0) / self.plant.energy_ref_j

    def violation_weight(self) -> Floats:
        """Reward lost per violation, in reference energies, one per row.

        The price of the episode, or the multiplier of its group.
        """
        if self.config.price is None:
            return self.multipliers[self.group]
        return self.price * self.request_cost[self.group]

    def _baseline_of(
        self, group: WorkloadGroup, member: int, freq_ghz: float
    ) -> tuple[float, float]:
        """Marginal energy per token (J) and idle power (W) of a group at the cheapest clock in a
        plant of this member.
        """
        model, work = group.plant.model, MARGINAL_WORK[self.config.phase]
        c = model.member(member)
        idle_w = float(c.n_gpus * idle_power_w(c, freq_ghz))
        joules = [float(model.energy_j(*w, freq_ghz * 1e3, member)) for w in work]
        seconds = [float(model.latency_s(*w, freq_ghz * 1e3, member)) for w in work]
        return (joules[1] - joules[0] - idle_w * (seconds[1] - seconds[0])) / (
            work[1][0] - work[0][0]
        ), idle_w

    def _start(self, rows: NDArray[np.int64]) -> None:
        r, rng, n = self.config.randomise, self.rng, len(rows)
        self.group[rows] = rng.integers(len(self.groups), size=n)
        low, high = self._first[self.group[rows]], self._first[self.group[rows] + 1]
        random = rng.random(n) >= r.nominal_share
        self.member[rows] = np.where(
            random, rng.integers(0, max(len(self._members) - 1, 1), size=n), -1
        )
        if self.config.price is not None:
            low_price, high_price = self.config.price
            self.price[rows] = np.exp(rng.uniform(np.log(low_price), np.log(high_price), size=n))
        slo = np.array([self.groups[g].slo_s for g in self.group[rows]]) * rng.uniform(
            *r.slo_scale, size=n
        )
        changes = {"slo_s": slo, "kv_capacity": self._capacity[self.group[rows]]}
        if r.delay_s is not None:
            changes["delay_s"] = rng.uniform(*r.delay_s, size=n)
        self.batch.reset(rows, rng.integers(low, high), self.member[rows], changes)
        self.batch.coefs[rows] = self._coefs[self.group[rows], self.member[rows] + 1]

    def _observe(self) -> NDArray[np.float32]:
        cheapest = self._cheapest[self.group, self.member + 1]
        features, self.rule, self._lost = self.features(self.batch.obs, self.batch.coefs, cheapest)
        return features if self.config.price is None else with_price(features, self.price)

    def reset(self) -> NDArray[np.float32]:
        """Start all episodes."""
        self._start(np.arange(self.num_envs))
        return self._observe()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions for ``step_wait``."""
        self._actions = actions

    def to_action(self, output: NDArray[Any]) -> NDArray[np.float32]:
        """Environment action of the network's output, (n,)."""
        if self.config.action == "levels":
            return self.levels[np.asarray(output).reshape(self.num_envs)]
        flat = np.asarray(output, dtype=np.float32).reshape(self.num_envs)
        if self.config.action == "rule":
            flat = self.rule + 2.0 * self.config.span * flat
        return np.ascontiguousarray(np.clip(flat, -1.0, 1.0), dtype=np.float32)

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """One decision in every row; finished episodes restart."""
        batch, st = self.batch, self.batch.states
        before_s, lost_before, tail = st["time_s"].copy(), self._lost, st["tail"].copy()
        batch.step(self.to_action(self._actions))
        done = batch.done
        violations, energy = st["step_violations"].astype(np.float64), st["step_energy_j"].copy()
        counted = self.member < 0 if self._nominal else np.ones(self.num_envs, dtype=bool)
        elapsed = st["time_s"] - before_s
        work = st["step_tokens"] * (
            np.maximum(st["step_iterations"], 1) if self.config.phase == "decode" else 1
        )
        base = self._baseline[self.group, self.member + 1]
        excess = (energy - base[:, 0] * work - base[:, 1] * elapsed) / self.plant.energy_ref_j
        features = self._observe()
        gamma = float(self.config.hyper.get("gamma", 0.99))
        refund = self._refunds[st["tail"]] - self._refunds[tail]
        weight, cell = self.violation_weight(), self._cells()
        self.tally.add(
            self.group,
            cell,
            counted,
            st["step_finished"].astype(np.float64),
            violations,
            excess + weight * (violations - refund),
            elapsed,
        )
        charged = violations + gamma * self._lost - lost_before - refund
        reward = self.cost_rate[cell] * elapsed - excess - weight * charged
        reward = self.config.reward_scale * reward / self._spread(cell, reward)
        infos = [NOTHING] * self.num_envs
        if done.any():
            features = self._restart(np.flatnonzero(done), features, infos)
        return features, reward.astype(np.float32), done.copy(), infos

    def _cells(self) -> NDArray[np.int64]:
        """Cell of each row: its group, and where its price stands in the range."""
        if self.config.price is None:
            return self.group * PRICE_BINS
        low, high = np.log(self.config.price)
        share = (np.log(self.price) - low) / max(high - low, 1e-9)
        return self.group * PRICE_BINS + np.clip(
            (share * PRICE_BINS).astype(np.int64), 0, PRICE_BINS - 1
        )

    def _restart(
        self, rows: NDArray[np.int64], last: NDArray[np.float32], infos: list[dict[str, Any]]
    ) -> NDArray[np.float32]:
        for i in rows:
            infos[i] = {"terminal_observation": last[i].copy(), "TimeLimit.truncated": True}
        self._start(rows)
        return self._observe()

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The shared attribute, once per copy asked for."""
        return [getattr(self, attr_name, None)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set a shared attribute."""
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Call a shared method once."""
        return [getattr(self, method_name)(*args, **kwargs)] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Copies are never wrapped one by one."""
        return [False] * len(list(self._get_indices(indices)))
