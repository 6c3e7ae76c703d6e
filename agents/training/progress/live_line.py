"""What a training run says of itself while it goes: a line for people, values for TensorBoard."""

import time
from collections.abc import Callable
from typing import Final

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from agents.training.progress.callbacks import Evaluate
from agents.training.worlds.duals import Duals
from agents.training.worlds.training_env import AgentVecEnv

LINE_EVERY_S: Final = 10.0
"""A line at most this often, s."""


def attained(duals: Duals) -> float:
    """Attainment of training so far: mean over groups, else of what was tallied; NaN for nothing.

    Args:
        duals: the run's.
    """
    known = duals.attainment[np.isfinite(duals.attainment)]
    if known.size:
        return float(known.mean())
    finished = float(duals.tally.finished.sum())
    return 1.0 - float(duals.tally.lost.sum()) / finished if finished else float("nan")


class LiveLine(BaseCallback):
    """Tells energy ratio, attainment, price, entropy and speed from the first rollout on.

    Energy ratio and price (or mean multiplier) are those of the last held-out evaluation,
    attainment that of the training episodes. TensorBoard has them under ``live/``, beside
    Stable-Baselines3's own ``train/entropy_loss`` and ``time/fps``.
    """

    def __init__(
        self,
        env: AgentVecEnv,
        evaluate: Evaluate,
        total: int,
        report: Callable[[str], None],
        every_s: float = LINE_EVERY_S,
    ) -> None:
        """Attach to a run.

        Args:
            env: its environment.
            evaluate: its evaluations.
            total: steps that it is to have at its end.
            report: takes a line.
            every_s: a line at most this often, s.
        """
        super().__init__()
        self._env, self._evaluate, self._total = env, evaluate, total
        self._report, self._every_s = report, every_s
        self._told_s, self._begin = -np.inf, (0.0, 0)

    def _values(self) -> dict[str, float]:
        history, duals = self._evaluate.history, self._env.duals
        price = self._evaluate.price
        found = {
            "energy_ratio": float(history[-1][1].energy_ratio.mean()) if history else np.nan,
            "attainment": attained(duals),
            "price": float(duals.multipliers.mean()) if price is None else price,
        }
        return {name: value for name, value in found.items() if np.isfinite(value)}

    def _on_training_start(self) -> None:
        self._begin = time.perf_counter(), self.num_timesteps

    def _on_rollout_end(self) -> None:
        for name, value in self._values().items():
            self.logger.record(f"live/{name}", value)

    def _on_rollout_start(self) -> None:
        now_s, (begin_s, begin) = time.perf_counter(), self._begin
        if self.num_timesteps == begin or now_s - self._told_s < self._every_s:
            return
        self._told_s = now_s
        values = self._values()
        loss = self.logger.name_to_value.get("train/entropy_loss")
        parts = [
            f"step {self.num_timesteps:,} of {self._total:,}",
            *([f"energy {values['energy_ratio']:.3f}"] if "energy_ratio" in values else []),
            *([f"attainment {values['attainment']:.2%}"] if "attainment" in values else []),
            f"price {values['price']:.3g}",
            *([] if loss is None else [f"entropy {-loss:.2f}"]),
            f"{(self.num_timesteps - begin) / (now_s - begin_s):,.0f} steps/s",
        ]
        self._report(", ".join(parts))

    def _on_step(self) -> bool:
        return True
