"""Clocks through NVIDIA's own library (``nvidia-ml-py``)."""

import contextlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks.backend import (
    ClockBackend,
    ClockDenied,
    ClockError,
    ClockReading,
    GpuDevice,
    GpuLost,
)

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
        for index in range(self._call("counting GPUs", pynvml.nvmlDeviceGetCount)):
            handle = self._call(f"opening GPU {index}", pynvml.nvmlDeviceGetHandleByIndex, index)
            uuid = _text(self._call(f"naming GPU {index}", pynvml.nvmlDeviceGetUUID, handle))
            name = _text(self._call(f"naming GPU {index}", pynvml.nvmlDeviceGetName, handle))
            self._handles[uuid] = handle
            self._devices.append(GpuDevice(index, uuid, name))
        self._supported: dict[str, list[float]] = {}
        self._instant_power = True
        self._pool: ThreadPoolExecutor | None = None

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
                "no NVIDIA driver was found on this machine (libnvidia-ml.so.1 is missing or the driver is not loaded)"
            )
        if code == nvml.NVML_ERROR_GPU_IS_LOST:
            return GpuLost(f"{what}: the GPU is lost (it fell off the bus or was reset)")
        if code == nvml.NVML_ERROR_NOT_SUPPORTED:
            return ClockError(f"{what}: this GPU or driver does not support it")
        if code == nvml.NVML_ERROR_INVALID_ARGUMENT:
            return ClockError(
                f"{what}: NVML calls the value invalid; ask for a supported clock (`biscale hw doctor` lists them)"
            )
        return ClockError(f"{what}: NVML error {code} ({error})")

    def _handle(self, uuid: str) -> Any:
        if uuid not in self._handles:
            raise ClockError(f"GPU {uuid} is not on this machine")
        return self._handles[uuid]

    def devices(self) -> list[GpuDevice]:
        """GPUs in NVML's order."""
        return list(self._devices)

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
        """Instantaneous board power, W; the one-second mean on drivers without the field.

        NaN without either.
        """
        nvml, handle = self._nvml, self._handle(uuid)
        if self._instant_power:
            try:
                field = nvml.nvmlDeviceGetFieldValues(handle, [POWER_INSTANT_FIELD])[0]
                if field.nvmlReturn == nvml.NVML_SUCCESS:
                    return float(field.value.uiVal) * 1e-3
            except nvml.NVMLError:
                pass
            self._instant_power = False
        try:
            return float(nvml.nvmlDeviceGetPowerUsage(handle)) * 1e-3
        except nvml.NVMLError:
            return math.nan

    def energy_j(self, uuid: str) -> float:
        """Energy since the driver was loaded, J."""
        millijoules = self._call(
            f"energy counter of {uuid}",
            self._nvml.nvmlDeviceGetTotalEnergyConsumption,
            self._handle(uuid),
        )
        return float(millijoules) * 1e-3

    def lock(self, uuid: str, low_mhz: float, high_mhz: float) -> None:
        """Lock the SM clock."""
        self._call(
            f"locking {uuid} at {high_mhz:g} MHz",
            self._nvml.nvmlDeviceSetGpuLockedClocks,
            self._handle(uuid),
            round(low_mhz),
            round(high_mhz),
        )

    def lock_all(self, uuids: Sequence[str], low_mhz: float, high_mhz: float) -> None:
        """Lock several GPUs side by side.

        The driver's time for one call is unknown until measured, and it is paid once.
        """
        if len(uuids) == 1:
            return self.lock(uuids[0], low_mhz, high_mhz)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=len(self._devices))
        for done in [self._pool.submit(self.lock, uuid, low_mhz, high_mhz) for uuid in uuids]:
            done.result()

    def reset(self, uuid: str) -> None:
        """Unlock the SM clock."""
        self._call(
            f"unlocking {uuid}", self._nvml.nvmlDeviceResetGpuLockedClocks, self._handle(uuid)
        )

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
        """Shut NVML down."""
        if self._pool is not None:
            self._pool.shutdown()
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()
