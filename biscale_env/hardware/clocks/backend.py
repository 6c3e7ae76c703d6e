"""What every way of setting clocks has in common.

The abstract backend, its readings and its refusals.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

from biscale_env.core.errors import BiscaleError

# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h)
REASON_IDLE = 0x1
REASON_POWER_CAP = 0x4
REASON_HW_SLOWDOWN = 0x8
REASON_SW_THERMAL = 0x20
REASON_HW_THERMAL = 0x40
REASON_POWER_BRAKE = 0x80
THROTTLE_REASONS = REASON_HW_SLOWDOWN | REASON_SW_THERMAL | REASON_HW_THERMAL | REASON_POWER_BRAKE
REASON_NAMES = {
    REASON_IDLE: "idle",
    REASON_POWER_CAP: "power cap",
    REASON_HW_SLOWDOWN: "hardware slowdown",
    REASON_SW_THERMAL: "software thermal slowdown",
    REASON_HW_THERMAL: "hardware thermal slowdown",
    REASON_POWER_BRAKE: "power brake",
}


class ClockError(BiscaleError):
    """The clocks of a GPU could not be read or set."""


class ClockDenied(ClockError):
    """The process lacks the privilege to lock clocks."""


class GpuLost(ClockError):
    """The GPU does not answer any more."""


@dataclass(frozen=True)
class GpuDevice:
    """One GPU as the driver names it.

    ``index`` is the driver's own, not that of ``CUDA_VISIBLE_DEVICES``.
    """

    index: int
    uuid: str
    name: str


@dataclass(frozen=True)
class ClockReading:
    """State of a GPU at one instant.

    Attributes:
        freq_mhz: SM clock, MHz; NaN when the GPU does not tell it.
        reasons: bits of the clock event reasons; 0 when the GPU does not tell them.
        temperature_c: GPU temperature, degrees Celsius; NaN when the GPU does not tell it.
        power_w: board power, W; NaN when the GPU does not tell it.
    """

    freq_mhz: float
    reasons: int
    temperature_c: float
    power_w: float

    @property
    def throttled(self) -> bool:
        """Whether heat or a power brake lowers the clock; the ordinary power cap does not count."""
        return bool(self.reasons & THROTTLE_REASONS)


@dataclass(frozen=True)
class PowerLimits:
    """What the driver lets a GPU's power limit be, W.

    Attributes:
        low_w: lowest limit.
        high_w: highest limit.
        default_w: the limit of a GPU that nobody has touched.
    """

    low_w: float
    high_w: float
    default_w: float

    def check(self, uuid: str, limit_w: float) -> None:
        """Refuse a limit that the driver would not take.

        Raises:
            ClockError: outside the range, or not a number.
        """
        if not self.low_w <= limit_w <= self.high_w:
            raise ClockError(
                f"limiting the power of {uuid} to {limit_w:g} W: this GPU takes {self.low_w:g} to "
                f"{self.high_w:g} W"
            )


def reason_text(reasons: int) -> str:
    """Clock event reasons in words."""
    names = [name for bit, name in REASON_NAMES.items() if reasons & bit]
    return ", ".join(names) or "none"


def failures_of(calls: Mapping[str, Callable[[], None]]) -> dict[str, ClockError]:
    """Make every call, one after the other; what went wrong, by key.

    An error that is none of ours (a broken library, a full disk) must not keep the remaining GPUs
    from being served, so it counts as a failure of its GPU too.
    """
    failures = {}
    for key, call in calls.items():
        try:
            call()
        except ClockError as error:
            failures[key] = error
        except Exception as error:
            failures[key] = ClockError(f"{key}: {type(error).__name__}: {error}")
    return failures


def _raise_first(failures: Mapping[str, ClockError]) -> None:
    for error in failures.values():
        raise error


class ClockBackend(abc.ABC):
    """Reads and locks SM clocks. GPUs are addressed by UUID, because indices change between boots.

    A lock outlives the process that made it; only :meth:`reset` (or a reboot, or a driver reload)
    ends it. NVML cannot say whether a clock is locked, so a lock that somebody else made before
    cannot be restored, only removed.
    """

    name: str = "abstract"
    can_lock: bool = True

    @abc.abstractmethod
    def devices(self) -> list[GpuDevice]:
        """GPUs of this machine, in the driver's order."""

    @abc.abstractmethod
    def supported_mhz(self, uuid: str) -> list[float]:
        """SM clocks that the GPU can run, rising, MHz."""

    @abc.abstractmethod
    def read(self, uuid: str) -> ClockReading:
        """Clock, event reasons, temperature and power now."""

    @abc.abstractmethod
    def energy_j(self, uuid: str) -> float:
        """Energy counter, J; only differences mean anything. NaN where the GPU has none."""

    @abc.abstractmethod
    def lock(self, uuid: str, low_mhz: float, high_mhz: float) -> None:
        """Hold the SM clock within ``[low_mhz, high_mhz]``.

        Raises:
            ClockDenied: no privilege.
            ClockError: unsupported clock, lost GPU, or any other refusal by the driver.
        """

    @abc.abstractmethod
    def reset(self, uuid: str) -> None:
        """Reset the clock to driver control.

        Returns after every earlier lock call of this GPU has ended.
        """

    def power_limits(self, uuid: str) -> PowerLimits:
        """What the power limit of a GPU may be, W.

        Raises:
            ClockError: this backend or GPU has no power limit.
        """
        raise ClockError(f"{uuid}: power limits cannot be set through {self.name}, use nvml")

    def power_limit_w(self, uuid: str) -> float:
        """The limit that was set last, W."""
        raise ClockError(f"{uuid}: power limits cannot be read through {self.name}, use nvml")

    def cap(self, uuid: str, limit_w: float) -> None:
        """Limit the power of a GPU, W; a limit outlives the process that made it, as a lock does.

        Raises:
            ClockDenied: no privilege.
            ClockError: outside what the driver takes, lost GPU, or any other refusal.
        """
        raise ClockError(f"{uuid}: power limits cannot be set through {self.name}, use nvml")

    def uncap(self, uuid: str) -> None:
        """Set the default limit again, after every earlier call of this GPU has ended."""
        raise ClockError(f"{uuid}: power limits cannot be set through {self.name}, use nvml")

    def lock_all(self, uuids: Sequence[str], low_mhz: float, high_mhz: float) -> None:
        """Lock several GPUs; every one is tried and no call is left running.

        Raises:
            ClockError: the first failure; the other GPUs may be locked.
        """
        _raise_first(self.lock_each(uuids, low_mhz, high_mhz))

    def reset_all(self, uuids: Sequence[str]) -> None:
        """Reset several GPUs; every one is tried.

        Raises:
            ClockError: the first failure.
        """
        _raise_first(self.reset_each(uuids))

    def lock_each(
        self, uuids: Sequence[str], low_mhz: float, high_mhz: float
    ) -> dict[str, ClockError]:
        """Lock several GPUs; never raises.

        Returns:
            What went wrong, by UUID; empty when all are locked.
        """
        return failures_of({u: partial(self.lock, u, low_mhz, high_mhz) for u in uuids})

    def reset_each(self, uuids: Sequence[str]) -> dict[str, ClockError]:
        """Reset several GPUs; never raises.

        Returns:
            What went wrong, by UUID; empty when all are reset.
        """
        return failures_of({u: partial(self.reset, u) for u in uuids})

    def cap_each(self, uuids: Sequence[str], limit_w: float) -> dict[str, ClockError]:
        """Limit the power of several GPUs; never raises.

        Returns:
            What went wrong, by UUID.
        """
        return failures_of({u: partial(self.cap, u, limit_w) for u in uuids})

    def uncap_each(self, uuids: Sequence[str]) -> dict[str, ClockError]:
        """Set the default limit of several GPUs; never raises.

        Returns:
            What went wrong, by UUID.
        """
        return failures_of({u: partial(self.uncap, u) for u in uuids})

    def outstanding(self) -> set[str]:
        """UUIDs of GPUs with a driver call that was given up waiting for and may still end."""
        return set()

    def unreachable(self) -> dict[str, str]:
        """GPUs that the driver counts but cannot open: index to a sentence that says why."""
        return {}

    def reaches(self, uuid: str) -> bool:
        """Whether a GPU can be addressed by its UUID, listed or not."""
        return any(device.uuid == uuid for device in self.devices())

    def close(self) -> None:  # noqa: B027 - nothing to release is a fine default
        """Release the driver; does not touch any clock."""

    def device(self, key: str) -> GpuDevice:
        """Find a GPU by index, UUID or unambiguous start of a UUID.

        Raises:
            ClockError: no such GPU; the message lists those there are.
        """
        found = [d for d in self.devices() if key == str(d.index) or d.uuid == key]
        found = found or [d for d in self.devices() if len(key) > 3 and d.uuid.startswith(key)]
        if not found and key in self.unreachable():
            raise ClockError(f"GPU {key} cannot be used: {self.unreachable()[key]}")
        if key.startswith("MIG-"):
            raise ClockError(
                f"{key} is a MIG instance, which has no clock of its own: name its whole GPU"
            )
        if len(found) != 1:
            known = ", ".join(f"{d.index} ({d.uuid})" for d in self.devices()) or "none"
            raise ClockError(f"no single GPU is called '{key}'; this machine has: {known}")
        return found[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


ATTEMPTS = 3  # of a driver call that may fail once


def insist(
    backend: ClockBackend,
    call: Callable[[Sequence[str]], dict[str, ClockError]],
    uuids: Sequence[str],
) -> dict[str, ClockError]:
    """Repeat a call for the GPUs where it failed, up to three attempts in all.

    Not where another attempt cannot help: a lost GPU, no privilege, a call that is still running.

    Args:
        backend: whose calls these are.
        call: does it for several GPUs and tells what went wrong, by UUID.
        uuids: for which GPUs.

    Returns:
        What went wrong at the last attempt, by UUID.
    """
    failures = call(uuids)
    for _ in range(ATTEMPTS - 1):
        running = backend.outstanding()
        again = [
            uuid
            for uuid, error in failures.items()
            if uuid not in running and not isinstance(error, GpuLost | ClockDenied)
        ]
        if not again:
            break
        later = call(again)
        failures = {u: e for u, e in failures.items() if u not in again} | later
    return failures
