"""The native batch as SB3's ``VecEnv`` for training: features in, learned action out.

Randomised plants (:mod:`agents.training.worlds.episodes`), a shaped reward
(:mod:`agents.training.worlds.reward`) and a constraint per group
(:mod:`agents.training.worlds.duals`).
"""

import io
import pickle
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from agents.policy.action_map import ActionMap
from agents.policy.features import FeatureMap, with_price
from agents.training.train_config import AgentConfig
from agents.training.worlds.episodes import EpisodeSampler
from agents.training.worlds.group_plants import GroupPlants
from agents.training.worlds.mixture import WorkloadGroup, plant_of
from agents.training.worlds.reward_meter import RewardMeter
from agents.training.worlds.shared_vec_env import SharedVecEnv
from agents.training.worlds.workload_set import WorkloadSet
from biscale_env.envs.batch import Batch

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]
NOTHING: dict[str, Any] = {}
ROWS = ("group", "member", "workload", "price")  # what an episode is, kept with a run


class AgentVecEnv(SharedVecEnv):
    """``n_envs`` randomised plants of one phase, stepped by one compiled call.

    Attributes:
        workloads: what is run, and what max clock does on it.
        plants: what each group's instances are.
        sampler: chooses the episodes.
        meter: makes the rewards from the records.
        shaper: its part that shapes them.
        duals: multipliers, measured by this environment and moved by the Lagrangian.
        group: group of each row's episode, (n_envs,).
        member: ensemble member of each row's plant, (n_envs,); -1 nominal.
        workload: number of each row's workload in the table, (n_envs,).
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
        self.plants = GroupPlants(groups, config.decision_interval_s)
        self.features = FeatureMap(config.phase, self.plant.spec)
        self.actions = ActionMap.of(config.action, config.span, self.plant.clocks)
        self.sampler = EpisodeSampler(
            config, groups, self.workloads.first, self.plants.n_members, seed
        )
        self.meter = RewardMeter(config, groups, self.plants, self.workloads)
        self.duals, self.shaper = self.meter.duals, self.meter.shaper
        self.group, self.member, self.workload = np.zeros((3, n), dtype=np.int64)
        self._known = self.plants.nominal(self.group, np.full(n, -1)).plants  # of each row
        self.price = np.full(n, config.constraint.start)
        self._outputs: NDArray[Any] = np.zeros(n, dtype=np.float32)
        self.dim = self.features.dim + (config.price is not None)
        space = gym.spaces.Box(-np.inf, np.inf, (self.dim,), dtype=np.float32)
        discrete = config.action == "levels"
        action: gym.Space[Any] = (
            gym.spaces.Discrete(len(self.actions.levels))
            if discrete
            else gym.spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)
        )
        super().__init__(n, space, action)

    def violation_weight(self) -> Floats:
        """Reward lost per violation, in reference energies, (n_envs,).

        The penalty of the episode, or the multiplier of its group.
        """
        return self.meter.violation_weight(self.group, self.price)

    def _start(self, rows: Ints) -> None:
        episodes = self.sampler.sample(len(rows))
        self.group[rows], self.member[rows] = episodes.group, episodes.member
        self.workload[rows] = episodes.workload
        self.price[rows] = episodes.price
        changes = {"slo_s": episodes.slo_s}
        if episodes.delay_s is not None:
            changes["delay_s"] = episodes.delay_s
        records = self.plants.records(episodes.group, episodes.member)
        self.batch.reset(rows, episodes.workload, episodes.member, changes, records)
        self._know_plants(rows)

    def _know_plants(self, rows: Ints) -> None:
        """Take what features need of the plants of some rows; they change with the episode only."""
        self._known[rows] = self.plants.nominal(self.group[rows], self.member[rows]).plants

    def _observe(self) -> Floats32:
        batch = self.batch
        features, self.rule, self._late = self.features(batch.obs, batch.coefs, self._known)
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
        tail = st["tail"].copy()
        self.batch.step(self.to_action(self._outputs))
        done = self.batch.done
        features = self._observe()
        effects = self.meter.effects(st, (tail, st["tail"]), (late_before, self._late))
        finished = st["step_finished"]
        reward = self.meter.reward(effects, finished, self.group, self.member, self.price)
        infos = [NOTHING] * self.num_envs
        if done.any():
            features = self._restart(np.flatnonzero(done), features, infos)
        return features, reward.astype(np.float32), done.copy(), infos

    def _restart(self, rows: Ints, last: Floats32, infos: list[dict[str, Any]]) -> Floats32:
        for i in rows:
            infos[i] = {"terminal_observation": last[i].copy(), "TimeLimit.truncated": True}
        self._start(rows)
        return self._observe()

    def state(self) -> dict[str, Any]:
        """Everything that changes while it runs, for a resumed run."""
        return {
            "batch": _Freezer.dumps(self.batch, self._shared()),
            "rows": {name: getattr(self, name).copy() for name in ROWS},
            "sampler": self.sampler.state(),
            "spread": (self.shaper.spread.squares.copy(), self.shaper.spread.weight.copy()),
            "duals": self.duals.state(),
        }

    def restore(self, state: dict[str, Any]) -> Floats32:
        """Go on from :meth:`state`; returns the features of the present observations."""
        self.batch = _Thawer.loads(state["batch"], self._shared())
        for name, value in state["rows"].items():
            getattr(self, name)[:] = value
        self._know_plants(np.arange(self.num_envs))
        self.sampler.restore(state["sampler"])
        self.shaper.spread.squares, self.shaper.spread.weight = (v.copy() for v in state["spread"])
        self.duals.restore(state["duals"])
        return self._observe()

    def _shared(self) -> dict[str, Any]:
        """Parts of the batch that a run makes anew instead of storing them."""
        return {"plant": self.plant, "table": self.workloads.table}


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
