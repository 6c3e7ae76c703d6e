"""The native batch as SB3's ``VecEnv`` for training: features in, learned action out.

Randomised plants (:mod:`agents.training.episodes`), a shaped reward (:mod:`agents.training.reward`)
and a constraint per group (:mod:`agents.training.duals`).
"""

import io
import pickle
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from agents.policy.action_map import ActionMap
from agents.policy.features import FeatureMap, with_price
from agents.training.duals import Duals
from agents.training.episodes import EpisodeSampler
from agents.training.mixture import WorkloadGroup, plant_of
from agents.training.reward import Effects, RewardShaper
from agents.training.train_config import AgentConfig
from agents.training.workload_set import WorkloadSet
from biscale_env.envs.batch import Batch

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]
NOTHING: dict[str, Any] = {}
PRICE_BINS = 4


class AgentVecEnv(VecEnv):
    """``n_envs`` randomised plants of one phase, stepped by one compiled call.

    Attributes:
        workloads: what is run, and what max clock does on it.
        sampler: chooses the episodes.
        shaper: makes the rewards.
        duals: multipliers, measured by this environment and moved by the Lagrangian.
        group: group of each row's episode, (n_envs,).
        member: ensemble member of each row's plant, (n_envs,); -1 nominal.
        price: SLO-violation penalty that the network is told in each row, (n_envs,).
        rule: the rule's action in each row, (n_envs,).
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
        n, self.config, self.groups = config.n_envs, config, list(groups)
        self.plant = plant_of(config)
        self.workloads = WorkloadSet(self.plant, groups, counts, held_out)
        self.batch = Batch(self.plant, n, self.workloads.table)
        self.features = FeatureMap(config.phase, self.plant.spec, self.plant.clocks)
        self.actions = ActionMap.of(config.action, config.span, self.plant.clocks)
        n_members = self.plant.model.n_members
        self._set_models(range(-1, n_members))
        self.sampler = EpisodeSampler(config, groups, self.workloads.first, n_members, seed)
        n_cells = len(groups) * PRICE_BINS
        fixed = config.price is not None
        self.duals = Duals(config.constraint, len(groups), n_cells, fixed)
        self.shaper = RewardShaper(
            groups,
            self._cheapest,
            n_cells,
            energy_ref_j=self.plant.energy_ref_j,
            gamma=float(config.hyper.get("gamma", 0.99)),
            scale=config.reward_scale,
        )
        self.group, self.member = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        self.price = np.full(n, config.constraint.start)
        self._nominal = config.randomise.nominal_share > 0.0
        self._outputs: NDArray[Any] = np.zeros(n, dtype=np.float32)
        self.dim = self.features.dim + fixed
        space = gym.spaces.Box(-np.inf, np.inf, (self.dim,), dtype=np.float32)
        discrete = config.action == "levels"
        action: gym.Space[Any] = (
            gym.spaces.Discrete(len(self.actions.levels))
            if discrete
            else gym.spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)
        )
        super().__init__(n, space, action)

    def _set_models(self, members: range) -> None:
        models = [self.features.nominal_model(g.plant.model, members) for g in self.groups]
        self._coefs = np.stack([m.coefs for m in models])
        self._cheapest = np.stack([m.cheapest_ghz for m in models])
        self._capacity = np.array([g.plant.kv_capacity_tokens for g in self.groups])

    def violation_weight(self) -> Floats:
        """Reward lost per violation, in reference energies, (n_envs,).

        The penalty of the episode, or the multiplier of its group.
        """
        if self.config.price is None:
            return self.duals.multipliers[self.group]
        return self.price * self.workloads.request_cost[self.group]

    def _start(self, rows: Ints) -> None:
        episodes = self.sampler.sample(len(rows))
        self.group[rows], self.member[rows] = episodes.group, episodes.member
        self.price[rows] = episodes.price
        changes = {"slo_s": episodes.slo_s, "kv_capacity": self._capacity[episodes.group]}
        if episodes.delay_s is not None:
            changes["delay_s"] = episodes.delay_s
        self.batch.reset(rows, episodes.workload, self.member[rows], changes)
        self.batch.coefs[rows] = self._coefs[episodes.group, episodes.member + 1]

    def _observe(self) -> Floats32:
        cheapest = self._cheapest[self.group, self.member + 1]
        features, self.rule, self._late = self.features(self.batch.obs, self.batch.coefs, cheapest)
        return features if self.config.price is None else with_price(features, self.price)

    def reset(self) -> Floats32:
        """Start all episodes."""
        self._start(np.arange(self.num_envs))
        return self._observe()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the outputs of the network for ``step_wait``."""
        self._outputs = actions

    def to_action(self, output: NDArray[Any]) -> Floats32:
        """Environment action of the network's output, (n_envs,)."""
        return np.ascontiguousarray(self.actions(output, self.rule), dtype=np.float32)

    def step_wait(
        self,
    ) -> tuple[Floats32, Floats32, NDArray[np.bool_], list[dict[str, Any]]]:
        """One decision in every row; finished episodes restart."""
        st, late_before = self.batch.states, self._late
        before_s, tail = st["time_s"].copy(), st["tail"].copy()
        self.batch.step(self.to_action(self._outputs))
        done = self.batch.done
        features = self._observe()
        effects = self._effects(before_s, tail, late_before)
        reward = self._reward(effects)
        infos = [NOTHING] * self.num_envs
        if done.any():
            features = self._restart(np.flatnonzero(done), features, infos)
        return features, reward.astype(np.float32), done.copy(), infos

    def _effects(self, before_s: Floats, tail: Ints, late_before: Floats32) -> Effects:
        st = self.batch.states
        decode = self.config.phase == "decode"
        return Effects(
            energy_j=st["step_energy_j"].copy(),
            elapsed_s=st["time_s"] - before_s,
            work=st["step_tokens"] * (np.maximum(st["step_iterations"], 1) if decode else 1),
            violations=st["step_violations"].astype(np.float64),
            refund=self.workloads.refund(tail, st["tail"]),
            late_before=late_before,
            late_now=self._late,
        )

    def _reward(self, effects: Effects) -> Floats:
        """Tally the effects, and reward them."""
        tally, weight, cell = self.duals.tally, self.violation_weight(), self._cells()
        excess = self.shaper.excess(effects, self.group, self.member)
        rows = self.member < 0 if self._nominal else np.ones(self.num_envs, dtype=bool)
        finished = self.batch.states["step_finished"].astype(np.float64)
        tally.count_requests(self.group[rows], finished[rows], effects.violations[rows])
        cost = excess + weight * (effects.violations - effects.refund)
        tally.count_cost(cell, cost, effects.elapsed_s)
        return self.shaper(effects, excess, weight, self.duals.cost_rate[cell], cell)

    def _cells(self) -> Ints:
        """Cell of each row: its group, and where its penalty stands in the range."""
        if self.config.price is None:
            return self.group * PRICE_BINS
        low, high = np.log(self.config.price)
        place = (np.log(self.price) - low) / max(high - low, 1e-9)
        bins = np.clip((place * PRICE_BINS).astype(np.int64), 0, PRICE_BINS - 1)
        return np.asarray(self.group * PRICE_BINS + bins)

    def _restart(self, rows: Ints, last: Floats32, infos: list[dict[str, Any]]) -> Floats32:
        for i in rows:
            infos[i] = {"terminal_observation": last[i].copy(), "TimeLimit.truncated": True}
        self._start(rows)
        return self._observe()

    def state(self) -> dict[str, Any]:
        """Everything that changes while it runs, for a resumed run."""
        return {
            "batch": _Freezer.dumps(self.batch, self._shared()),
            "rows": {name: getattr(self, name).copy() for name in ("group", "member", "price")},
            "sampler": self.sampler.state(),
            "spread": (self.shaper.spread.squares.copy(), self.shaper.spread.weight.copy()),
            "duals": self.duals.state(),
        }

    def restore(self, state: dict[str, Any]) -> Floats32:
        """Go on from :meth:`state`; returns the features of the present observations."""
        self.batch = _Thawer.loads(state["batch"], self._shared())
        for name, value in state["rows"].items():
            getattr(self, name)[:] = value
        self.sampler.restore(state["sampler"])
        self.shaper.spread.squares, self.shaper.spread.weight = (v.copy() for v in state["spread"])
        self.duals.restore(state["duals"])
        return self._observe()

    def _shared(self) -> dict[str, Any]:
        """Parts of the batch that a run makes anew instead of storing them."""
        return {"plant": self.plant, "table": self.workloads.table}

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The shared attribute, once per sub-environment asked for."""
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
        """Sub-environments are never wrapped one by one."""
        return [False] * len(list(self._get_indices(indices)))


class _Freezer(pickle.Pickler):
    """Pickles a batch without what is shared with its environment."""

    def __init__(self, file: io.BytesIO, shared: dict[str, Any]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._names = {id(value): name for name, value in shared.items()}

    def persistent_id(self, obj: Any) -> str | None:
        return self._names.get(id(obj))

    @classmethod
    def dumps(cls, value: Any, shared: dict[str, Any]) -> bytes:
        file = io.BytesIO()
        cls(file, shared).dump(value)
        return file.getvalue()


class _Thawer(pickle.Unpickler):
    """Reads what `_Freezer` wrote."""

    def __init__(self, file: io.BytesIO, shared: dict[str, Any]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, pid: Any) -> Any:
        return self._shared[pid]

    @classmethod
    def loads(cls, data: bytes, shared: dict[str, Any]) -> Any:
        return cls(io.BytesIO(data), shared).load()
