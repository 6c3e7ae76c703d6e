"""A run of parameter-shared training in one directory.

Phases take turns: in a round the prefill network learns for an episode of every cluster while the
decode network holds still, then the other way round. Every half of a round begins with new episodes
and with seeds of its own, so a run that was interrupted goes on as if it had not been.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from agents.multi.cluster_rows import ClusterRows
from agents.multi.multi_config import PHASES, MultiConfig
from agents.multi.phase_env import PhaseVecEnv
from agents.multi.phase_networks import card_of, learn_actor, start_network, take_actor
from agents.policy.numpy_policy import Network
from agents.training.algorithms import algorithm
from agents.training.export import to_network
from agents.training.run import make_model
from agents.training.run_config import open_config
from biscale_env.core.files import lock, open_whole, write_whole

DONE: Final = "rounds.csv"
DEFAULT_PRICE: Final = {"prefill": 60.0, "decode": 30.0}
Say = Callable[[str], None]


class MultiRun:
    """Both networks, their learners and what they learn in.

    Attributes:
        config: of the run.
        folder: its directory.
        rounds: rounds that are over.
    """

    def __init__(self, config: MultiConfig, folder: Path, resume: bool) -> None:
        """From nothing, or from the last round.

        Raises:
            BiscaleError: a run that may not be resumed, or none to resume.
        """
        folder.mkdir(parents=True, exist_ok=True)
        open_config(folder, config.model_dump(mode="json"), resume)
        self.config, self.folder = config, folder
        clusters = ClusterRows(config)
        self._envs = {phase: PhaseVecEnv(clusters, phase) for phase in PHASES}
        self.rounds, self._log = 0, ["round,phase,group,attainment\n"]
        self._models: dict[str, Any] = {}
        for phase in PHASES:
            agent, env = config.agent(phase), self._envs[phase]
            self._models[phase] = make_model(agent, env, folder / phase)
            if phase in config.start:
                take_actor(self._models[phase], start_network(config.start[phase], phase))
        if (folder / DONE).is_file():
            self._restore()

    def network(self, phase: str) -> Network:
        """The present network of a phase."""
        model = self._models[phase]
        card = card_of(self.config, phase, self.rounds, model.num_timesteps)
        return to_network(model, self.config.agent(phase), card, DEFAULT_PRICE[phase])

    def round(self, say: Say) -> None:
        """One round, stored when it is over."""
        for phase in PHASES:
            self._learn(phase)
        self.rounds += 1
        for phase in PHASES:
            duals = self._envs[phase].reward.meter.duals
            names = self._envs[phase].clusters.group_names
            for name, attained in zip(names, duals.attainment, strict=True):
                self._log.append(f"{self.rounds},{phase},{name},{attained:.5f}\n")
            told = " ".join(f"{100 * a:.2f}" for a in duals.attainment)
            say(f"round {self.rounds} of {self.config.rounds}, {phase}: attained % {told}")
        self._store()

    def _learn(self, phase: str) -> None:
        from stable_baselines3.common.utils import FloatSchedule, set_random_seed

        model, env, config = self._models[phase], self._envs[phase], self.config
        entropy = [config.seed, self.rounds, PHASES.index(phase)]
        seeds = np.random.SeedSequence(entropy).generate_state(2)
        set_random_seed(int(seeds[0]))
        env.begin(int(seeds[1]), {p: self.network(p) for p in PHASES if p != phase})
        learn_actor(model, self.rounds >= config.critic_rounds)
        rate = float(model.learning_rate) * (1.0 - self.rounds / config.rounds)
        model.lr_schedule = FloatSchedule(rate)
        model._last_obs = None  # SB3 then starts from a reset
        model.learn(
            env.num_envs * config.steps,
            reset_num_timesteps=model.num_timesteps == 0,
            tb_log_name="run",
            log_interval=1,
        )
        env.reward.end_of_round()

    def _store(self) -> None:
        for phase in PHASES:
            with open_whole(self.folder / f"{phase}.zip") as temporary:
                self._models[phase].save(temporary)
            rewards = self.folder / f"{phase}-rewards.npz"
            with open_whole(rewards) as temporary, temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **self._envs[phase].reward.state())
            self.network(phase).save(self.folder / f"{phase}.npz")
        write_whole(self.folder / DONE, "".join(self._log))

    def _restore(self) -> None:
        self._log = (self.folder / DONE).read_text().splitlines(keepends=True)
        self.rounds = int(self._log[-1].split(",")[0])
        for phase in PHASES:
            agent, env = self.config.agent(phase), self._envs[phase]
            path = self.folder / f"{phase}.zip"
            self._models[phase] = algorithm(agent.algo).load(path, env=env, device=agent.device)
            with np.load(self.folder / f"{phase}-rewards.npz") as kept:
                env.reward.restore(dict(kept))


def train_multi(config: MultiConfig, folder: Path, resume: bool, say: Say) -> None:
    """Train or go on; ``prefill.npz`` and ``decode.npz`` in the folder are the result.

    Args:
        config: of the run.
        folder: its directory.
        resume: go on with a run that is there.
        say: takes the lines of progress.

    Raises:
        BiscaleError: there is a run that may not be resumed, or none to resume.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", what=f"training run {folder}"):
        run = MultiRun(config, folder, resume)
        while run.rounds < config.rounds:
            run.round(say)
