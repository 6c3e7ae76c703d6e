"""What an actuator is told, and what it knows about each group of GPUs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zmq
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks.backend import ClockBackend, ClockReading, PowerLimits
from biscale_env.hardware.clocks.means import CAP, LOCK, MEANS, check_untouched
from biscale_env.hardware.loop.wire import ClockChange
from biscale_env.hardware.remote.command_desk import DeskSettings


@dataclass(frozen=True)
class ActuatorConfig:
    """Settings of one actuator.

    Attributes:
        groups: GPUs (UUID, index or start of a UUID) of each group; a group is one engine instance
            and has one clock.
        sockets: folder of the sockets.
        backend: name for :func:`~biscale_env.hardware.clocks.backend_registry.open_backend`.
        freq_min_mhz: lowest clock ever set; None: the lowest that the GPU supports.
        freq_max_mhz: highest clock ever set; None: the highest that the GPU supports.
        lease_s: the clock is reset when no live command came for this long.
        hot_c: above this temperature (assumed: under the slowdown threshold of an H100), or while a
            GPU is throttled by heat or a power brake, the clock may be lowered but not raised.
        cool_down_c: the guard ends this far below ``hot_c``.
        readback_s: how long a new clock is looked for.
        lower_bound: ``fixed`` locks (f, f), ``cap`` locks (lowest, f) and lets an idle GPU fall.
        failed_reads: readings of the guard that may fail in a row before a group is released; ten
            per second.
        means: ``lock`` locks clocks, ``cap`` limits the power by what the controller says instead.
        desk: where commands of other machines are taken; None: nowhere.
    """

    groups: Mapping[str, tuple[str, ...]]
    sockets: Path
    backend: str = "nvml"
    freq_min_mhz: float | None = None
    freq_max_mhz: float | None = None
    lease_s: float = 1.5
    hot_c: float = 85.0
    cool_down_c: float = 3.0
    readback_s: float = 0.5
    lower_bound: str = "fixed"
    failed_reads: int = 10
    means: str = LOCK
    desk: DeskSettings | None = None

    def __post_init__(self) -> None:
        if not self.groups or not all(self.groups.values()):
            raise BiscaleError(
                "the actuator needs at least one group with at least one GPU, "
                "e.g. --gpus prefill=0,1,2,3"
            )
        if not 0.1 <= self.lease_s <= 10:
            raise BiscaleError(f"lease of {self.lease_s:g} s: choose 0.1 to 10 s")
        low, high = self.bounds_mhz
        if not 0 <= low <= high:
            raise BiscaleError(f"clock bounds {low:g} to {high:g} MHz are not a range")
        if self.lower_bound not in ("fixed", "cap"):
            raise BiscaleError(f"unknown lower bound '{self.lower_bound}': choose fixed or cap")
        if self.means not in MEANS:
            raise BiscaleError(f"unknown means '{self.means}': choose lock or cap")
        if self.failed_reads < 0:
            raise BiscaleError(f"{self.failed_reads} failed readings in a row: choose 0 or more")

    @property
    def bounds_mhz(self) -> tuple[float, float]:
        """Lowest and highest clock, MHz; 0 and infinity where only the GPU bounds it."""
        low = 0.0 if self.freq_min_mhz is None else self.freq_min_mhz
        return low, math.inf if self.freq_max_mhz is None else self.freq_max_mhz


@dataclass
class GpuGroup:
    """State of one group while the actuator runs.

    Attributes:
        name: of the group.
        uuids: its GPUs.
        supported_mhz: clocks that may be set, (n,), rising, MHz.
        limits: what the power limit may be, where clocks are held by it; None: they are locked.
        applied_mhz: clock last sent to the driver, MHz; 0 under driver control.
        applied_w: power limit last sent for it, W; 0: none.
        alive_until_s: end of the lease.
        throttled: the guard allows no raise.
        released: why the group is not controlled any more; empty while it is.
        failed_reads: readings of the guard that have failed in a row.
        power_w: mean power of its GPUs at the last reading of the guard, W.
        sequence: of the newest command heard.
        held_mhz: request that was held back last, so that it is logged once.
        pending: change that has not been read back yet.
    """

    name: str
    uuids: Sequence[str]
    supported_mhz: NDArray[np.float64]
    limits: PowerLimits | None = None
    applied_mhz: float = 0.0
    applied_w: float = 0.0
    alive_until_s: float = -math.inf
    throttled: bool = False
    released: str = ""
    failed_reads: int = 0
    power_w: float = math.nan
    sequence: int = -1
    held_mhz: float = math.nan
    pending: ClockChange | None = None
    commands: int = 0
    skipped: int = 0
    changes: int = 0
    socket: zmq.Socket | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, name: str, uuids: Sequence[str], backend: ClockBackend, config: ActuatorConfig
    ) -> "GpuGroup":
        """A group with the clocks that its GPUs support within the bounds.

        Raises:
            BiscaleError: there is none, or the power of a GPU is limited by somebody else.
        """
        low, high = config.bounds_mhz
        clocks = np.array(backend.supported_mhz(uuids[0]))
        clocks = clocks[(clocks >= low) & (clocks <= high)]
        if clocks.size == 0:
            raise BiscaleError(
                f"the GPUs of group '{name}' support no clock within {low:g} to {high:g} MHz"
            )
        limits = check_untouched(backend, uuids) if config.means == CAP else None
        return cls(name, list(uuids), clocks, limits)

    def snap(self, freq_mhz: float) -> float:
        """Nearest supported clock within the bounds, MHz.

        0 (driver control) for 0 or for anything that is not a number.
        """
        if not math.isfinite(freq_mhz) or freq_mhz <= 0:
            return 0.0
        return float(self.supported_mhz[np.argmin(np.abs(self.supported_mhz - freq_mhz))])

    def limit_w(self, cap_w: float, wanted_mhz: float) -> float:
        """Power limit for a clock, W, within what the driver takes; 0: none is set."""
        if self.limits is None or not wanted_mhz:
            return 0.0
        return min(max(cap_w, self.limits.low_w), self.limits.high_w)

    def may_set(self, freq_mhz: float, limit_w: float = 0.0) -> bool:
        """Whether the guard allows a clock, MHz; 0 is driver control, which may raise it.

        Where it is held by a power limit, W, that must not rise.
        """
        if not self.throttled:
            return True
        if self.limits is not None:
            return limit_w != 0.0 and limit_w <= (self.applied_w or math.inf)
        return freq_mhz != 0.0 and freq_mhz <= (self.applied_mhz or math.inf)

    def shows(self, freq_mhz: float, readings: Sequence[ClockReading]) -> bool:
        """Whether every GPU runs at a clock, to half a step of the supported ones."""
        steps = np.diff(self.supported_mhz)
        step = float(np.min(steps)) if steps.size else 1.0
        return all(abs(r.freq_mhz - freq_mhz) < 0.5 * step for r in readings)
