"""The screen of one instance: its clock, power, queue or batch, and slack."""

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.envs.batch import Batch
from biscale_env.envs.observe import NO_DEADLINE
from biscale_env.envs.plant import Plant
from biscale_env.render.screen import Screen
from biscale_env.render.strips import MISSES, Strip

KEPT_STEPS = 2048  # more than ten seconds of decode


class InstanceScreen(Screen):
    """What one row of a batch did in the last seconds.

    Libraries ask for ``rgb_array`` and then never look (Stable-Baselines3's ``make_vec_env``), so a
    step is only copied, and everything else waits for a frame.
    """

    def __init__(self, plant: Plant, mode: str, row: int = 0) -> None:
        """Prepare an empty screen.

        Args:
            plant: gives phase, clocks and power limit.
            mode: a render mode.
            row: of the batch.
        """
        prefill, clocks = plant.phase == "prefill", plant.clocks
        self._row, self._spec, self._prefill = row, plant.spec, prefill
        limit_w = plant.model.member(-1).p_cap_w * plant.settings.instance.tp
        slack = (
            Strip("slack", "time left to the next deadline, TTFT bounds", -0.2, 1.0, 0.0, 2)
            if prefill
            else Strip("slack", "tightest slack, token intervals saved", -5.0, 20.0, 0.0, 1)
        )
        strips = (
            Strip("freq_mhz", "clock, MHz", clocks.freq_min_mhz, clocks.freq_max_mhz),
            Strip("power_w", "power of the instance, W", 0.0, limit_w),
            Strip("load", "waiting requests" if prefill else "running requests"),
            slack,
        )
        title = (
            f"{plant.phase}, {plant.llm.name} on {plant.settings.instance.tp} x {plant.gpu.name}"
        )
        super().__init__(mode, title, strips)
        self._kept: deque[tuple[Any, NDArray[np.float32]]] = deque(maxlen=KEPT_STEPS)

    def begin(self, batch: Batch) -> None:
        """An episode begins; what it waited for its first request is the first step."""
        self._kept.clear()
        self.step(batch)

    def step(self, batch: Batch) -> None:
        """Keep the last step of the row; what is drawn is made of it when a frame is asked for."""
        self._kept.append((batch.states[self._row].copy(), batch.obs[self._row].copy()))
        if self.mode == "human":
            self.draw()
            self.show()

    def draw(self) -> None:
        """Fill the strips with the steps of the last seconds."""
        self.clear()
        if not self._kept:
            return
        now_s = float(self._kept[-1][0]["time_s"])
        for st, obs in self._kept:
            if st["time_s"] >= now_s - self.span_s:
                self._add_step(st, obs)
        last = self._kept[-1][0]
        self.misses, self.finished = float(last["violations"]), float(last["finished"])

    def frame(self) -> str | NDArray[np.uint8]:
        """See :meth:`biscale_env.render.screen.Screen.frame`."""
        self.draw()
        return super().frame()

    def _add_step(self, st: Any, obs: NDArray[np.float32]) -> None:
        """Work first, then what was waited (in a step of several iterations, all of both)."""
        begin_s, end_s = float(st["step_start_s"]), float(st["time_s"])
        idle_j, idle_s = float(st["step_energy_idle_j"]), float(st["step_idle_s"])
        busy_j, busy_s = float(st["step_energy_j"]) - idle_j, float(st["step_duration_s"])
        freq_mhz = float(st["step_freq_mean_ghz"]) * 1e3 if busy_s > 0 else np.nan
        load = float(st["step_queue"] if self._prefill else st["step_requests"])
        values = {"freq_mhz": freq_mhz, "load": load, "slack": self._slack(obs)}
        if busy_s > 0:
            at_end = {MISSES: float(st["step_violations"])}
            self.add(begin_s, begin_s + busy_s, {**values, **at_end, "power_w": busy_j / busy_s})
        if idle_s > 0:
            self.add(end_s - idle_s, end_s, {**values, "power_w": idle_j / idle_s})

    def _slack(self, obs: NDArray[np.float32]) -> float:
        """Slack of the request that is nearest to its bound; NaN without one."""
        spec = self._spec
        if not self._prefill:
            runs = obs[spec.index("batch")] > 0
            return float(spec.value(obs, "tpot_slack_min")) if runs else np.nan
        deadlines = spec.horizon(obs, "batch_slack")
        known = deadlines[deadlines < NO_DEADLINE]
        return float(known.min()) if known.size else np.nan
