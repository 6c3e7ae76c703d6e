"""Clocks through NVIDIA's own library (``nvidia-ml-py``)."""

import contextlib
import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from biscale_env.core.errors import BiscaleError, BiscaleWarning
from biscale_env.hardware.clocks.backend import (
    ClockBackend,
    ClockError,
    ClockReading,
    GpuDevice,
    GpuLost,
    PowerLimits,
)
from biscale_env.hardware.clocks.driver_calls import LOCK_TIMEOUT_S, RESET_TIMEOUT_S, DriverCalls
from biscale_env.hardware.clocks.nvml_answers import OptionalReadings, refusal


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class NvmlBackend(ClockBackend):
    """NVML.

    Locking needs root; reading does not. Keeps the library open, so that the driver stays loaded
    and keeps the lock.
    """

    name = "nvml"

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError:
            raise BiscaleError(
                "the package nvidia-ml-py is not installed: pip install 'biscale-env[hw]'"
            ) from None
        self._nvml = pynvml
        self._call("starting NVML", pynvml.nvmlInit)
        self._handles: dict[str, Any] = {}
        self._devices: list[GpuDevice] = []
        self._unreachable: dict[str, str] = {}
        self._open_all(self._call("counting GPUs", pynvml.nvmlDeviceGetCount))
        self._supported: dict[str, list[float]] = {}
        self._mean_power: set[str] = set()  # GPUs without the instantaneous reading
        self._readings = OptionalReadings(pynvml)
        self._calls = DriverCalls()

    def _open_all(self, count: int) -> None:
        """Open every GPU; one that fails must not keep the others from being used.

        Raises:
            ClockError: not a single one can be opened.
        """
        refusals = []
        for index in range(count):
            try:
                device = self._open(index)
            except ClockError as error:
                refusals.append(error)
                self._unreachable[str(index)] = str(error)
            else:
                self._devices.append(device)
        if refusals and not self._devices:
            raise refusals[0]

    def _open(self, index: int) -> GpuDevice:
        nvml = self._nvml
        handle = self._call(f"opening GPU {index}", nvml.nvmlDeviceGetHandleByIndex, index)
        uuid = _text(self._call(f"naming GPU {index}", nvml.nvmlDeviceGetUUID, handle))
        try:
            name = _text(nvml.nvmlDeviceGetName(handle))
        except (nvml.NVMLError, UnicodeError):
            name = "unnamed GPU"  # no reason to leave its clock locked
        self._handles[uuid] = handle
        return GpuDevice(index, uuid, name)

    def reaches(self, uuid: str) -> bool:
        """Whether a GPU can be addressed, also one that its index does not lead to any more."""
        if uuid not in self._handles:
            with contextlib.suppress(self._nvml.NVMLError):
                self._handles[uuid] = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        return uuid in self._handles

    def _call(self, what: str, function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except self._nvml.NVMLError as error:
            raise refusal(self._nvml, what, error) from None

    def _handle(self, uuid: str) -> Any:
        if uuid not in self._handles:
            raise ClockError(f"GPU {uuid} is not on this machine")
        return self._handles[uuid]

    def devices(self) -> list[GpuDevice]:
        """GPUs in NVML's order, without those that cannot be opened."""
        return list(self._devices)

    def unreachable(self) -> dict[str, str]:
        """GPUs that NVML counts but does not open, by index."""
        return dict(self._unreachable)

    def supported_mhz(self, uuid: str) -> list[float]:
        """Supported SM clocks at the highest memory clock, rising, MHz."""
        if uuid not in self._supported:
            handle, nvml = self._handle(uuid), self._nvml
            memory = self._call(
                f"memory clocks of {uuid}", nvml.nvmlDeviceGetSupportedMemoryClocks, handle
            )
            clocks: list[int] = []
            for memory_mhz in sorted(memory, reverse=True):
                clocks = self._call(
                    f"SM clocks of {uuid}",
                    nvml.nvmlDeviceGetSupportedGraphicsClocks,
                    handle,
                    memory_mhz,
                )
                if clocks:
                    break
            if not clocks:
                raise ClockError(f"SM clocks of {uuid}: the driver lists none")
            self._supported[uuid] = sorted(float(c) for c in clocks)
        return self._supported[uuid]

    def read(self, uuid: str) -> ClockReading:
        """Clock, reasons, temperature and power; what this GPU lacks is NaN (reasons: 0)."""
        nvml, handle = self._nvml, self._handle(uuid)
        freq_mhz = self._readings.value(
            "clock", uuid, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        )
        reasons = self._readings.value(
            "clock event reasons",
            uuid,
            lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
            lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),  # before driver 535
        )
        heat_c = self._readings.value(
            "temperature",
            uuid,
            lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        )
        known = 0 if math.isnan(reasons) else int(reasons)
        return ClockReading(freq_mhz, known, heat_c, self.power_w(uuid))

    def power_w(self, uuid: str) -> float:
        """Board power, W: instantaneous, else the mean of one second, else NaN.

        A GPU or driver without the instantaneous field is remembered, and said once per GPU in a
        warning. A reading that fails for another reason is tried again next time.
        """
        nvml, handle = self._nvml, self._handle(uuid)

        def mean_w() -> float:
            power_w = float(nvml.nvmlDeviceGetPowerUsage(handle)) * 1e-3
            if uuid not in self._mean_power and self._readings.lacks("power", uuid):
                self._mean_power.add(uuid)
                warnings.warn(
                    f"{uuid}: the driver has no instantaneous power reading, its mean over one "
                    "second is used (the energy counter is not concerned)",
                    BiscaleWarning,
                    stacklevel=2,
                )
            return power_w

        try:
            return self._readings.value(
                "power", uuid, lambda: self._readings.instant_power_w(handle), mean_w
            )
        except GpuLost:
            raise
        except ClockError:  # not now
            return math.nan

    def energy_j(self, uuid: str) -> float:
        """Energy since the driver was loaded, J; NaN where the GPU has no counter."""
        nvml, handle = self._nvml, self._handle(uuid)
        return 1e-3 * self._readings.value(
            "energy counter", uuid, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        )

    def peculiarities(self, uuid: str) -> list[str]:
        """What is unusual about a GPU and matters to whoever sets its clock, in sentences."""
        nvml, handle = self._nvml, self._handle(uuid)
        found = []
        with contextlib.suppress(nvml.NVMLError, AttributeError):
            if nvml.nvmlDeviceGetMigMode(handle)[0]:
                found.append(
                    "MIG is on: its instances share one clock, power and energy are the whole GPU's"
                )
        with contextlib.suppress(nvml.NVMLError, AttributeError):
            if (
                nvml.nvmlDeviceGetVirtualizationMode(handle)
                == nvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU
            ):
                found.append("it is a vGPU: its clock is the host's to set, use --observe-only")
        return found

    def _set_lock(self, uuid: str, low_mhz: float, high_mhz: float) -> None:
        self._call(
            f"locking {uuid} at {high_mhz:g} MHz",
            self._nvml.nvmlDeviceSetGpuLockedClocks,
            self._handle(uuid),
            round(low_mhz),
            round(high_mhz),
        )

    def _reset_lock(self, uuid: str) -> None:
        self._call(
            f"unlocking {uuid}", self._nvml.nvmlDeviceResetGpuLockedClocks, self._handle(uuid)
        )

    def lock(self, uuid: str, low_mhz: float, high_mhz: float) -> None:
        """Lock the SM clock."""
        self._calls.wait(uuid, LOCK_TIMEOUT_S)
        self._set_lock(uuid, low_mhz, high_mhz)

    def reset(self, uuid: str) -> None:
        """Unlock the SM clock."""
        self._calls.wait(uuid, RESET_TIMEOUT_S)
        self._reset_lock(uuid)

    def lock_each(
        self, uuids: Sequence[str], low_mhz: float, high_mhz: float
    ) -> dict[str, ClockError]:
        """Lock several GPUs side by side, so that the driver's time for one call is paid once."""
        if len(uuids) == 1 and not self._calls.outstanding():
            return super().lock_each(uuids, low_mhz, high_mhz)
        calls = {u: partial(self._set_lock, u, low_mhz, high_mhz) for u in uuids}
        return self._calls.each(calls, LOCK_TIMEOUT_S)

    def reset_each(self, uuids: Sequence[str]) -> dict[str, ClockError]:
        """Unlock several GPUs side by side."""
        return self._calls.each({u: partial(self._reset_lock, u) for u in uuids}, RESET_TIMEOUT_S)

    def power_limits(self, uuid: str) -> PowerLimits:
        """What the driver lets the power limit be, W."""
        nvml, handle, what = self._nvml, self._handle(uuid), f"power limits of {uuid}"
        low, high = self._call(what, nvml.nvmlDeviceGetPowerManagementLimitConstraints, handle)
        default = self._call(what, nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
        return PowerLimits(low * 1e-3, high * 1e-3, default * 1e-3)

    def power_limit_w(self, uuid: str) -> float:
        """The limit that is set, W."""
        get, what = self._nvml.nvmlDeviceGetPowerManagementLimit, f"power limit of {uuid}"
        return float(self._call(what, get, self._handle(uuid))) * 1e-3

    def _set_limit(self, uuid: str, limit_w: float | None) -> None:
        """Set a limit, or the default one (None); what is outside the range is refused here."""
        limits = self.power_limits(uuid)
        if limit_w is None:
            limit_w = limits.default_w
        limits.check(uuid, limit_w)
        self._call(
            f"limiting the power of {uuid} to {limit_w:g} W",
            self._nvml.nvmlDeviceSetPowerManagementLimit,
            self._handle(uuid),
            round(limit_w * 1e3),
        )

    def cap(self, uuid: str, limit_w: float) -> None:
        """Limit the power."""
        self._calls.wait(uuid, LOCK_TIMEOUT_S)
        self._set_limit(uuid, limit_w)

    def uncap(self, uuid: str) -> None:
        """Set the default limit."""
        self._calls.wait(uuid, RESET_TIMEOUT_S)
        self._set_limit(uuid, None)

    def cap_each(self, uuids: Sequence[str], limit_w: float) -> dict[str, ClockError]:
        """Limit the power of several GPUs side by side."""
        calls = {u: partial(self._set_limit, u, limit_w) for u in uuids}
        return self._calls.each(calls, LOCK_TIMEOUT_S)

    def uncap_each(self, uuids: Sequence[str]) -> dict[str, ClockError]:
        """Set the default limits of several GPUs side by side."""
        return self._calls.each(
            {u: partial(self._set_limit, u, None) for u in uuids}, RESET_TIMEOUT_S
        )

    def outstanding(self) -> set[str]:
        """GPUs with a driver call that has not ended."""
        return self._calls.outstanding()

    def persistence(self, uuid: str) -> bool | None:
        """Whether persistence mode is on (without it an unloading driver drops the lock).

        None when unknown.
        """
        try:
            return bool(self._nvml.nvmlDeviceGetPersistenceMode(self._handle(uuid)))
        except self._nvml.NVMLError:
            return None

    def driver_version(self) -> str:
        """Version of the NVIDIA driver."""
        return _text(self._call("driver version", self._nvml.nvmlSystemGetDriverVersion))

    def close(self) -> None:
        """Shut NVML down, unless a driver call is still running in it."""
        running = self._calls.outstanding()
        self._calls.close()
        if running:
            return
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()
