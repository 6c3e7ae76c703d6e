"""Callbacks of SB3: the Lagrangian, held-out evaluation with checkpoints, and a stop at the first
value that is not finite.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback

from agents.training.heldout import SHORTFALL_PRICE, Act, HeldOut, HeldoutMetrics
from agents.training.train_config import AgentConfig
from agents.training.training_env import AgentVecEnv, Tally
from biscale_env.core.errors import BiscaleError

MIN_REQUESTS = 200  # per group, on average, before a multiplier moves


class Lagrangian(BaseCallback):
    """Moves one multiplier per group by plain SGD on (target - measured attainment), clamped at 0
    and at a maximum.

    It also measures the cost rate of each group (and price), which the reward is relative to (see
    :mod:`agents.training.training_env`).

    Attributes:
        attainment: running mean per group; NaN before the first measurement.
        path: every multiplier vector so far, with the env step.
    """

    def __init__(self, env: AgentVecEnv, targets: NDArray[np.float64], config: AgentConfig) -> None:
        """Attach to the environment whose ``multipliers`` it moves and whose ``tally`` it reads."""
        super().__init__()
        self.env, self.targets, self.constraint = env, targets, config.constraint
        self.attainment = np.full(len(targets), np.nan)
        self.path: list[tuple[int, NDArray[np.float64]]] = []

    def update(self, tally: Tally) -> None:
        """One SGD step on what was measured since the last."""
        c, seen = self.constraint, tally.finished > 0
        now = np.where(seen, 1.0 - tally.lost / np.maximum(tally.finished, 1.0), self.attainment)
        old = np.where(np.isnan(self.attainment), now, self.attainment)
        self.attainment = c.memory * old + (1.0 - c.memory) * now
        step = c.rate * np.nan_to_num(self.targets - self.attainment)
        if self.env.config.price is None:
            self.env.multipliers = np.clip(self.env.multipliers + step, 0.0, c.maximum)
        rate = np.where(
            tally.time_s > 0, tally.cost / np.maximum(tally.time_s, 1e-9), self.env.cost_rate
        )
        self.env.cost_rate = (
            rate if not self.path else c.memory * self.env.cost_rate + (1.0 - c.memory) * rate
        )
        self.path.append((self.num_timesteps, self.env.multipliers.copy()))

    def _on_step(self) -> bool:
        tally = self.env.tally
        if tally.finished.sum() >= MIN_REQUESTS * len(self.targets):
            self.update(tally)
            self.env.tally = self.env.new_tally()
            for group, m, a in zip(
                self.env.groups, self.env.multipliers, self.attainment, strict=True
            ):
                self.logger.record(f"multiplier/{group.name}", float(m))
                self.logger.record(f"attainment/{group.name}", float(a))
        return True


class FiniteGuard(BaseCallback):
    """Ends training with one sentence when a parameter is no longer finite."""

    def check(self) -> None:
        """Look at every parameter of the policy.

        Raises:
            BiscaleError: one of them is NaN or infinite.
        """
        for name, value in self.model.policy.named_parameters():
            if not bool(value.isfinite().all()):
                raise BiscaleError(
                    f"training broke at step {self.num_timesteps}: '{name}' is not finite; the last good checkpoint is kept, "
                    "lower learning_rate or max_grad_norm and train again"
                )

    def _on_rollout_start(self) -> None:
        self.check()

    def _on_step(self) -> bool:
        return True


class Evaluate(BaseCallback):
    """Evaluates on held-out workloads, keeps the best policy, writes the resumable state, stops
    early.

    Attributes:
        history: ``(env step, HeldoutMetrics, score)`` of every evaluation.
        best: lowest score so far.
        reached: the SLO is met everywhere at the energy that was aimed at: training ends.
    """

    def __init__(
        self,
        config: AgentConfig,
        held_out: HeldOut,
        targets: NDArray[np.float64],
        names: list[str],
        act: Act,
        save: Callable[[bool, int, HeldoutMetrics], None],
    ) -> None:
        """Keep everything needed.

        Args:
            config: the run.
            held_out: the workloads.
            targets: attainment per group.
            names: of the groups.
            act: the current deterministic policy.
            save: called as ``save(is_best, env_step, figures)``.
        """
        super().__init__()
        self.config, self.held_out, self.targets, self.names, self.act, self.save = (
            config,
            held_out,
            targets,
            names,
            act,
            save,
        )
        self.history: list[tuple[int, HeldoutMetrics, float]] = []
        self.price: float | None = None
        self.margin = 0.0
        self.best, self.worse, self._next = float("inf"), 0, 0
        self.reached = False

    def _settings(self) -> list[tuple[float | None, float]]:
        """``(price, margin)`` pairs to choose among.

        Margins at the default price, else prices, else the only one there is.
        """
        config = self.config
        if config.margins:
            return [(config.default_price if config.price else None, m) for m in config.margins]
        return (
            [(float(p), 0.0) for p in np.geomspace(*config.price, config.evaluation.prices)]
            if config.price
            else [(None, 0.0)]
        )

    def at_best_setting(self) -> HeldoutMetrics:
        """HeldoutMetrics with, per group, the cheapest setting of the free parameter that meets its
        target; keeps the best common one.
        """
        settings, tried = self._settings(), []
        for price, margin in settings:
            self.act.price, self.act.margin = price, margin  # type: ignore[attr-defined]
            tried.append(self.held_out(self.act))
        energy, attained = (
            np.stack([f.energy_ratio for f in tried]),
            np.stack([f.attainment for f in tried]),
        )
        value = energy + SHORTFALL_PRICE * np.maximum(self.targets - attained, 0.0)
        at, groups = value.argmin(axis=0), np.arange(energy.shape[1])
        self.price, self.margin = settings[int(value.mean(axis=1).argmin())]
        return HeldoutMetrics(energy[at, groups], attained[at, groups])

    def evaluate(self) -> HeldoutMetrics:
        """Evaluate now, log, save."""
        figures = self.at_best_setting()
        score = figures.score(self.targets)
        self.history.append((self.num_timesteps, figures, score))
        better = score < self.best
        self.best, self.worse = (score, 0) if better else (self.best, self.worse + 1)
        self.logger.record("held_out/score", score)
        self.logger.record("held_out/energy_ratio", float(figures.energy_ratio.mean()))
        for name, ratio, attained in zip(
            self.names, figures.energy_ratio, figures.attainment, strict=True
        ):
            self.logger.record(f"held_out/energy_ratio/{name}", float(ratio))
            self.logger.record(f"held_out/attainment/{name}", float(attained))
        goal, met = self.config.evaluation.goal, bool((figures.attainment >= self.targets).all())
        self.reached = goal is not None and met and float(figures.energy_ratio.mean()) <= goal
        self.save(better, self.num_timesteps, figures)
        return figures

    def take_up(
        self, best: float, worse: int, history: list[tuple[int, HeldoutMetrics, float]]
    ) -> None:
        """Go on where an interrupted run stood; its last evaluation is made again."""
        self.best, self.worse, self.history = best, worse, history[:-1]

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self._next:
            self.evaluate()
            self._next = self.num_timesteps + self.config.evaluation.every_steps

    def _on_step(self) -> bool:
        patience = self.config.evaluation.patience
        return not (self.reached or (patience and self.worse >= patience))
