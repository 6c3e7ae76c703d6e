"""The clock of a fake GPU as an emulated engine follows it."""

import math
import time
from collections import deque

import numpy as np

from biscale_env.hardware.clocks.fake_gpus import FakeState, settle

HISTORY = 64


class ClockHistory:
    """Watches the clock of one fake GPU and remembers when it changed.

    Times relative to the engine's start.
    """

    def __init__(self, state: FakeState, index: int, epoch_s: float) -> None:
        self.state, self.index, self.epoch_s = state, index, epoch_s
        self._landed: deque[tuple[float, float]] = deque()
        self._table = np.zeros((HISTORY + 1, 2))
        with state.locked() as gpus:
            self._last_s = float(gpus[index]["landed_at_s"])
            self.freq_ghz = float(gpus[index]["freq_mhz"]) * 1e-3

    def look(self, from_s: float) -> tuple[float, np.ndarray, int]:
        """Clock at ``from_s`` (which never goes back) and its changes since.

        Those that took effect and the one in flight.

        Returns:
            Clock in GHz, and the changes as kernels take them: table of (time, GHz) and its number
            of rows.
        """
        with self.state.lock():
            gpu = self.state.gpus[self.index]
            settle(gpu, time.monotonic(), float(self.state.header["delay_s"]))
            landed_s, freq_mhz = float(gpu["landed_at_s"]), float(gpu["freq_mhz"])
            coming_s, coming_mhz = float(gpu["apply_at_s"]), float(gpu["inflight_mhz"])
        if landed_s > self._last_s:
            self._last_s = landed_s
            self._landed.append((landed_s - self.epoch_s, freq_mhz * 1e-3))
        while self._landed and (self._landed[0][0] <= from_s or len(self._landed) > HISTORY):
            self.freq_ghz = self._landed.popleft()[1]
        for n, change in enumerate(self._landed):
            self._table[n] = change
        n = len(self._landed)
        if math.isfinite(coming_s):
            self._table[n] = coming_s - self.epoch_s, coming_mhz * 1e-3
            n += 1
        return self.freq_ghz, self._table, n
