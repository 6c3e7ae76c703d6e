"""What every way of setting clocks has in common.

The abstract backend, its readings and its refusals.
"""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        freq_mhz: SM clock, MHz.
        reasons: bits of the clock event reasons; 0 when the backend cannot read them.
        temperature_c: GPU temperature, degrees Celsius.
        power_w: board power, W; NaN when the backend cannot read it.
    """

    freq_mhz: float
    reasons: int
    temperature_c: float
    power_w: float

    @property
    def throttled(self) -> bool:
        """Whether heat or a power brake holds the clock down (the ordinary power cap does not
        count).
        """
        return bool(self.reasons & THROTTLE_REASONS)


def reason_text(reasons: int) -> str:
    """Clock event reasons in words."""
    names = [name for bit, name in REASON_NAMES.items() if reasons & bit]
    return ", ".join(names) or "none"


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
        """Energy counter, J; only differences mean anything."""

    @abc.abstractmethod
    def lock(self, uuid: str, low_mhz: float, high_mhz: float) -> None:
        """Hold the SM clock within ``[low_mhz, high_mhz]``.

        Raises:
            ClockDenied: no privilege.
            ClockError: unsupported clock, lost GPU, or any other refusal by the driver.
        """

    @abc.abstractmethod
    def reset(self, uuid: str) -> None:
        """Give the clock back to the driver."""

    def lock_all(self, uuids: Sequence[str], low_mhz: float, high_mhz: float) -> None:
        """Lock several GPUs; returns when all are."""
        for uuid in uuids:
            self.lock(uuid, low_mhz, high_mhz)

    def reset_all(self, uuids: Sequence[str]) -> None:
        """Reset several GPUs; tries every one before it raises the first error."""
        errors = []
        for uuid in uuids:
            try:
                self.reset(uuid)
            except ClockError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:  # noqa: B027 - nothing to release is a fine default
        """Release the driver; does not touch any clock."""

    def device(self, key: str) -> GpuDevice:
        """Find a GPU by index, UUID or unambiguous start of a UUID.

        Raises:
            ClockError: no such GPU; the message lists those there are.
        """
        found = [d for d in self.devices() if key == str(d.index) or d.uuid == key]
        found = found or [d for d in self.devices() if len(key) > 3 and d.uuid.startswith(key)]
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


class ObserveOnly(ClockBackend):
    """Reads through another backend and never writes.

    What a policy *would* do is logged, the clocks stay as they are.
    """

    name = "observe"
    can_lock = False

    def __init__(self, inner: ClockBackend) -> None:
        self.inner = inner

    def devices(self) -> list[GpuDevice]:
        """GPUs of the inner backend."""
        return self.inner.devices()

    def supported_mhz(self, uuid: str) -> list[float]:
        """Clocks of the inner backend, MHz."""
        return self.inner.supported_mhz(uuid)

    def read(self, uuid: str) -> ClockReading:
        """Reading of the inner backend."""
        return self.inner.read(uuid)

    def energy_j(self, uuid: str) -> float:
        """Energy counter of the inner backend, J."""
        return self.inner.energy_j(uuid)

    def lock(self, uuid: str, low_mhz: float, high_mhz: float) -> None:
        """Do nothing."""

    def reset(self, uuid: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close the inner backend."""
        self.inner.close()


def _nvml(_: str) -> ClockBackend:
    from biscale_env.hardware.clocks.nvml import NvmlBackend

    return NvmlBackend()


def _zeusd(address: str) -> ClockBackend:
    from biscale_env.hardware.clocks.zeusd import ZeusdBackend

    return ZeusdBackend(address or None)


def _fake(address: str) -> ClockBackend:
    from biscale_env.hardware.clocks.fake_gpus import FakeBackend

    return FakeBackend(address)


BACKENDS: dict[str, Callable[[str], ClockBackend]] = {"nvml": _nvml, "zeusd": _zeusd, "fake": _fake}


def open_backend(name: str, observe_only: bool = False) -> ClockBackend:
    """Open a backend by name.

    Args:
        name: ``nvml``, ``zeusd[:SOCKET]`` or ``fake:STATE_FILE``.
        observe_only: wrap it so that it never writes.

    Raises:
        BiscaleError: unknown name, or the driver or daemon is not there.
    """
    kind, _, address = name.partition(":")
    if kind not in BACKENDS:
        raise BiscaleError(
            f"unknown clock backend '{name}': choose nvml, zeusd[:SOCKET] or fake:STATE_FILE"
        )
    backend = BACKENDS[kind](address)
    return ObserveOnly(backend) if observe_only else backend
