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
    ClockDenied,
    ClockError,
    ClockReading,
    GpuDevice,
    GpuLost,
)
from biscale_env.hardware.clocks.driver_calls import LOCK_TIMEOUT_S, RESET_TIMEOUT_S, DriverCalls

HOW_TO_GET_PRIVILEGE = (
    "run the actuator as root (in a container with the capability SYS_ADMIN), "
    "use --backend zeusd, or use --observe-only"
)
# NVML_FI_DEV_POWER_INSTANT (nvml.h): mW, without the one-second mean of nvmlDeviceGetPowerUsage
POWER_INSTANT_FIELD = 186


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
        name = _text(self._call(f"naming GPU {index}", nvml.nvmlDeviceGetName, handle))
        self._handles[uuid] = handle
        return GpuDevice(index, uuid, name)

    def _call(self, what: str, function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except self._nvml.NVMLError as error:
            raise self._refusal(what, error) from None

    def _refusal(self, what: str, error: Any) -> ClockError:
        nvml, code = self._nvml, error.value
        if code == nvml.NVML_ERROR_NO_PERMISSION:
            return ClockDenied(
                f"{what}: NVML refuses without the privilege; {HOW_TO_GET_PRIVILEGE}"
            )
        if code in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
            return ClockError(
                "no NVIDIA driver was found on this machine "
                "(libnvidia-ml.so.1 is missing or the driver is not loaded)"
            )
        if code == nvml.NVML_ERROR_GPU_IS_LOST:
            return GpuLost(f"{what}: the GPU is lost (it fell off the bus or was reset)")
        if code == nvml.NVML_ERROR_NOT_SUPPORTED:
            return ClockError(f"{what}: this GPU or driver does not support it")
        if code == nvml.NVML_ERROR_INVALID_ARGUMENT:
            return ClockError(
                f"{what}: NVML calls the value invalid; "
                "ask for a supported clock (`biscale hw doctor` lists them)"
            )
        return ClockError(f"{what}: NVML error {code} ({error})")

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
            handle = self._handle(uuid)
            memory = self._call(
                f"memory clocks of {uuid}", self._nvml.nvmlDeviceGetSupportedMemoryClocks, handle
            )
            clocks = self._call(
                f"SM clocks of {uuid}",
                self._nvml.nvmlDeviceGetSupportedGraphicsClocks,
                handle,
                max(memory, default=0),
            )
            if not clocks:
                raise ClockError(f"SM clocks of {uuid}: the driver lists none")
            self._supported[uuid] = sorted(float(c) for c in clocks)
        return self._supported[uuid]

    def read(self, uuid: str) -> ClockReading:
        """Clock, reasons, temperature and power."""
        nvml, handle = self._nvml, self._handle(uuid)
        freq = self._call(
            f"clock of {uuid}", nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM
        )
        reasons = self._call(
            f"event reasons of {uuid}", nvml.nvmlDeviceGetCurrentClocksEventReasons, handle
        )
        heat = self._call(
            f"temperature of {uuid}",
            nvml.nvmlDeviceGetTemperature,
            handle,
            nvml.NVML_TEMPERATURE_GPU,
        )
        return ClockReading(float(freq), int(reasons), float(heat), self.power_w(uuid))

    def power_w(self, uuid: str) -> float:
        """Board power, W: instantaneous, else the mean of one second, else NaN.

        A GPU or driver without the instantaneous field is remembered, and said once per GPU in a
        warning. A reading that fails for another reason is tried again next time.
        """
        nvml, handle = self._nvml, self._handle(uuid)
        if uuid not in self._mean_power:
            try:
                field = nvml.nvmlDeviceGetFieldValues(handle, [POWER_INSTANT_FIELD])[0]
                code = field.nvmlReturn
            except nvml.NVMLError as error:
                code = error.value
            if code == nvml.NVML_SUCCESS:
                return float(field.value.uiVal) * 1e-3
            if code in self._without_field():
                self._mean_power.add(uuid)
                warnings.warn(
                    f"{uuid}: the driver has no instantaneous power reading, its mean over one "
                    "second is used (the energy counter is not concerned)",
                    BiscaleWarning,
                    stacklevel=2,
                )
        try:
            return float(nvml.nvmlDeviceGetPowerUsage(handle)) * 1e-3
        except nvml.NVMLError:
            return math.nan

    def _without_field(self) -> tuple[int, ...]:
        """Answers that mean "never", not "not now"."""
        nvml = self._nvml
        return (
            nvml.NVML_ERROR_NOT_SUPPORTED,
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            nvml.NVML_ERROR_INVALID_ARGUMENT,
        )

    def energy_j(self, uuid: str) -> float:
        """Energy since the driver was loaded, J."""
        millijoules = self._call(
            f"energy counter of {uuid}",
            self._nvml.nvmlDeviceGetTotalEnergyConsumption,
            self._handle(uuid),
        )
        return float(millijoules) * 1e-3

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
