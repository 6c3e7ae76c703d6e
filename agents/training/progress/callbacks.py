"""Callbacks of SB3: the Lagrangian, held-out evaluation, checkpoints, a stop at NaN."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback

from agents.training.heldout import SHORTFALL_PRICE, HeldOut, HeldoutMetrics
from agents.training.policy_on_rows import HeldOutPolicy
from agents.training.progress.logs import Evaluation
from agents.training.train_config import AgentConfig
from agents.training.worlds.training_env import AgentVecEnv
from biscale_env.core.errors import BiscaleError

MIN_REQUESTS = 200  # per group, on average, before a multiplier moves


class Lagrangian(BaseCallback):
    """Moves the multipliers of an environment's :class:`agents.training.worlds.duals.Duals`.

    Attributes:
        path: every multiplier vector so far, with the env step.
    """

    def __init__(self, env: AgentVecEnv, targets: NDArray[np.float64]) -> None:
        """Attach to an environment; ``targets`` is the attainment asked for per group."""
        super().__init__()
        self.env, self.targets = env, targets
        self.path: list[tuple[int, NDArray[np.float64]]] = []

    def update(self) -> None:
        """One step of the multipliers on what was tallied since the last."""
        duals = self.env.duals
        duals.update(self.targets)
        self.path.append((self.num_timesteps, duals.multipliers.copy()))

    def _on_step(self) -> bool:
        duals = self.env.duals
        if duals.tally.finished.sum() >= MIN_REQUESTS * len(self.targets):
            self.update()
            for group, m, a in zip(
                self.env.groups, duals.multipliers, duals.attainment, strict=True
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
                    f"training broke at step {self.num_timesteps}: '{name}' is not finite; the "
                    "last good checkpoint is kept, lower learning_rate or max_grad_norm and train "
                    "again"
                )

    def _on_rollout_start(self) -> None:
        self.check()

    def _on_step(self) -> bool:
        return True


class Evaluate(BaseCallback):
    """Evaluates on held-out workloads, hands over the result, stops early.

    Attributes:
        history: ``(env step, HeldoutMetrics, score)`` of every evaluation.
        best: lowest score so far.
        worse: evaluations since then.
        next_step: env step from which on the next evaluation is due.
        price: SLO-violation penalty of the last evaluation's best common setting; None: it takes
            none.
        margin: margin of that setting.
        reached: the SLO is met everywhere at the energy that was aimed at: training ends.
    """

    def __init__(
        self,
        config: AgentConfig,
        held_out: HeldOut,
        names: list[str],
        policy: HeldOutPolicy,
        save: Callable[[bool, int, HeldoutMetrics], None],
    ) -> None:
        """Keep everything needed.

        Args:
            config: the run.
            held_out: the workloads, with their targets.
            names: of the groups.
            policy: the current deterministic policy.
            save: called as ``save(is_best, env_step, metrics)``.
        """
        super().__init__()
        self.config, self.held_out, self.names = config, held_out, names
        self.targets, self.policy, self.save = held_out.targets, policy, save
        self.history: list[Evaluation] = []
        self.price: float | None = None
        self.margin = 0.0
        self.best, self.worse, self.next_step = float("inf"), 0, 0
        self.reached = False

    def settings(self) -> list[tuple[float | None, float]]:
        """``(price, margin)`` pairs to choose among.

        Margins at the default penalty, else penalties, else the only one there is.
        """
        config = self.config
        if config.margins:
            return [(config.default_price if config.price else None, m) for m in config.margins]
        if config.price is None:
            return [(None, 0.0)]
        return [(float(p), 0.0) for p in np.geomspace(*config.price, config.evaluation.prices)]

    def at_best_setting(self) -> HeldoutMetrics:
        """Metrics with, per group, the cheapest setting that meets its target.

        Keeps the best common setting in ``price`` and ``margin``.
        """
        settings, tried = self.settings(), []
        for price, margin in settings:
            self.policy.price, self.policy.margin = price, margin
            tried.append(self.held_out(self.policy))
        energy = np.stack([m.energy_ratio for m in tried])
        attained = np.stack([m.attainment for m in tried])
        value = energy + SHORTFALL_PRICE * np.maximum(self.targets - attained, 0.0)
        at, groups = value.argmin(axis=0), np.arange(energy.shape[1])
        self.price, self.margin = settings[int(value.mean(axis=1).argmin())]
        return HeldoutMetrics(energy[at, groups], attained[at, groups])

    def evaluate(self) -> HeldoutMetrics:
        """Evaluate now, log, save."""
        metrics = self.at_best_setting()
        score = metrics.score(self.targets)
        self.history.append((self.num_timesteps, metrics, score))
        better = score < self.best
        self.best, self.worse = (score, 0) if better else (self.best, self.worse + 1)
        self.next_step = self.num_timesteps + self.config.evaluation.every_steps
        self._log(metrics, score)
        goal, met = self.config.evaluation.goal, bool((metrics.attainment >= self.targets).all())
        self.reached = goal is not None and met and float(metrics.energy_ratio.mean()) <= goal
        self.save(better, self.num_timesteps, metrics)
        return metrics

    def _log(self, metrics: HeldoutMetrics, score: float) -> None:
        self.logger.record("held_out/score", score)
        self.logger.record("held_out/energy_ratio", float(metrics.energy_ratio.mean()))
        for name, ratio, attained in zip(
            self.names, metrics.energy_ratio, metrics.attainment, strict=True
        ):
            self.logger.record(f"held_out/energy_ratio/{name}", float(ratio))
            self.logger.record(f"held_out/attainment/{name}", float(attained))

    def state(self) -> dict[str, Any]:
        """Everything that changes, for a resumed run."""
        names = ("history", "best", "worse", "next_step", "price", "margin", "reached")
        return {name: getattr(self, name) for name in names} | {"history": list(self.history)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        for name, value in state.items():
            setattr(self, name, value)
        self.history = list(state["history"])

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self.next_step:
            self.evaluate()

    def _on_step(self) -> bool:
        patience = self.config.evaluation.patience
        return not (self.reached or (patience and self.worse >= patience))


class Checkpoint(BaseCallback):
    """Remembers the last resumable moment, and stores it now and then.

    A moment is resumable at the start of a rollout: then nothing is half done.
    """

    def __init__(self, remember: Callable[[], None], store: Callable[[], None]) -> None:
        """Attach to a run.

        Args:
            remember: called at every start of a rollout.
            store: called after it when a store is due.
        """
        super().__init__()
        self.remember, self.store = remember, store

    def _on_rollout_start(self) -> None:
        self.remember()
        self.store()

    def _on_step(self) -> bool:
        return True
