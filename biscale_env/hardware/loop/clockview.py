"""What a controller knows about the clock it controls.

By the rules of the actuator and the delay, corrected by what the actuator tells.
"""

import math
from typing import Any

from biscale_env.contract import ClockRange
from biscale_env.core.clockqueue import advance_to, request, settled_at
from biscale_env.hardware.loop.wire import UNCHANGED, ClockChange


class ClockView:
    """Clock in effect, in flight and requested, MHz; times are CLOCK_MONOTONIC seconds."""

    def __init__(self, clocks: ClockRange, delay_s: float) -> None:
        """Begin with the driver's own clock, taken to be the highest."""
        self.clocks = clocks
        self.delay_s = delay_s
        self._newest = (-1, math.nan, -math.inf)  # sequence, clock and time of the newest request
        self.driver_controls()

    @property
    def freq_mhz(self) -> float:
        """Clock in effect."""
        return self.queue.applied

    @property
    def inflight_mhz(self) -> float:
        """Clock that takes effect next; the one in effect when nothing is in flight."""
        return self.queue.inflight

    @property
    def requested_mhz(self) -> float:
        """Newest request that the actuator has not refused."""
        return self.queue.requested

    @property
    def apply_at_s(self) -> float:
        """When the one in flight takes effect; inf: nothing is in flight."""
        return self.queue.apply_at_s

    def driver_controls(self) -> None:
        """The clock is under driver control."""
        self.queue = settled_at(self.clocks.freq_max_mhz)

    def request(self, freq_mhz: float, now_s: float, sequence: int = -1) -> None:
        """A command goes out now, with this number."""
        self._newest = (sequence, freq_mhz, now_s)
        self.settle(now_s)
        self.queue = request(self.queue, freq_mhz, now_s, self.delay_s)

    def settle(self, now_s: float) -> None:
        """Let clocks take effect whose delay is over."""
        if self.queue.apply_at_s <= now_s:
            self.queue = advance_to(self.queue, now_s, self.delay_s)

    def hear(self, change: ClockChange) -> None:
        """Take over what the actuator tells about a change, or about one it refused."""
        if not math.isfinite(change.freq_mhz):
            return
        if change.cause in UNCHANGED:
            self._unchanged(change.freq_mhz)
            sequence, freq_mhz, requested_s = self._newest
            if change.sequence < sequence:  # a newer command is on its way to the actuator
                self.queue = request(self.queue, freq_mhz, requested_s, self.delay_s)
        elif change.cause == "error" or change.freq_mhz == 0.0:
            self.driver_controls()
        elif math.isfinite(change.seen_s):
            self._seen(change)
        else:
            self._sent(change)

    def _unchanged(self, freq_mhz: float) -> None:
        """The applied clock stays, whatever was requested."""
        if freq_mhz == 0.0:
            self.driver_controls()
            return
        if self.inflight_mhz == freq_mhz and math.isfinite(self.apply_at_s):
            self.queue = self.queue._replace(requested=freq_mhz)
        else:
            self.queue = settled_at(freq_mhz)

    def _sent(self, change: ClockChange) -> None:
        """A command went to the driver, perhaps bounded to another clock than requested."""
        if math.isfinite(self.apply_at_s) and self.inflight_mhz == change.requested_mhz:
            self.queue = self.queue._replace(inflight=change.freq_mhz)
        if change.sequence >= self._newest[0]:
            self.queue = request(self.queue, change.freq_mhz, change.set_s, self.delay_s)

    def _seen(self, change: ClockChange) -> None:
        """A clock was read back on every GPU."""
        newest = change.sequence >= self._newest[0]
        if change.freq_mhz == self.inflight_mhz:
            newest = self.requested_mhz == change.freq_mhz
            self.queue = self.queue._replace(applied=change.freq_mhz)
        if newest:
            self.queue = settled_at(change.freq_mhz)

    def write(self, st: Any, now_s: float, epoch_s: float, lead_s: float = 0.0) -> None:
        """Put the clock as it will be ``lead_s`` after ``now_s`` into a state of the simulator.

        Its time starts at ``epoch_s``.
        """
        self.settle(now_s)
        queue = self.queue
        if lead_s > 0.0 and queue.apply_at_s <= now_s + lead_s:
            queue = advance_to(queue, now_s + lead_s, self.delay_s)
        st["freq_ghz"] = queue.applied / 1e3
        st["inflight_ghz"] = queue.inflight / 1e3
        st["requested_ghz"] = queue.requested / 1e3
        st["apply_at_s"] = queue.apply_at_s - epoch_s
