"""What a controller knows about the clock it controls.

By the rules of the actuator and the delay, corrected by what was seen.
"""

import math
from typing import Any

from biscale_env.contract import ClockRange
from biscale_env.hardware.loop.wire import ClockChange


class ClockView:
    """Clock in force, on its way and wanted, MHz; times are CLOCK_MONOTONIC seconds."""

    def __init__(self, clocks: ClockRange, delay_s: float) -> None:
        """Begin with the driver's own clock, taken to be the highest."""
        self.clocks = clocks
        self.delay_s = delay_s
        self.given_back()

    def given_back(self) -> None:
        """The clock is with the driver."""
        top = self.clocks.freq_max_mhz
        self.freq_mhz = self.inflight_mhz = self.wanted_mhz = top
        self.apply_at_s = math.inf

    def ask(self, freq_mhz: float, now_s: float) -> None:
        """A command goes out now."""
        self.settle(now_s)
        if freq_mhz == self.wanted_mhz:
            return
        self.wanted_mhz = freq_mhz
        if math.isinf(self.apply_at_s):
            self.inflight_mhz, self.apply_at_s = freq_mhz, now_s + self.delay_s

    def settle(self, now_s: float) -> None:
        """Let what should have landed by now land."""
        while self.apply_at_s <= now_s:
            self.freq_mhz = self.inflight_mhz
            if self.wanted_mhz == self.freq_mhz:
                self.apply_at_s = math.inf
            else:
                self.inflight_mhz, self.apply_at_s = self.wanted_mhz, self.apply_at_s + self.delay_s

    def hear(self, change: ClockChange) -> None:
        """The actuator reports a change."""
        if change.cause in ("lease", "start", "exit", "error"):
            self.given_back()
        elif (
            change.cause == "command"
            and math.isfinite(change.seen_s)
            and change.freq_mhz == self.inflight_mhz
        ):
            self.freq_mhz = change.freq_mhz
            if self.wanted_mhz == change.freq_mhz:
                self.apply_at_s = math.inf

    def write(self, st: Any, now_s: float, epoch_s: float) -> None:
        """Put the clock into a record of the simulator's state, whose time starts at ``epoch_s``."""
        self.settle(now_s)
        st["freq_ghz"], st["inflight_ghz"], st["wanted_ghz"] = (
            self.freq_mhz / 1e3, self.inflight_mhz / 1e3, self.wanted_mhz / 1e3
        )  # fmt: skip
        st["apply_at_s"] = self.apply_at_s - epoch_s
