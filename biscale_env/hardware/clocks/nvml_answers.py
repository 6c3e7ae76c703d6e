"""What NVML answers when it does not answer: refusals in words, and readings that may be missing.

A driver without a symbol (an old one), a vGPU, a MIG instance or a consumer GPU leaves readings
out. What can be read is read; what cannot is said once and is NaN from then on.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

from biscale_env.core.errors import BiscaleWarning
from biscale_env.hardware.clocks.backend import ClockDenied, ClockError, GpuLost

HOW_TO_GET_PRIVILEGE = (
    "run the actuator as root (in a container with the capability SYS_ADMIN), "
    "use --backend zeusd, or use --observe-only"
)
# NVML_FI_DEV_POWER_INSTANT (nvml.h): mW, without the one-second mean of nvmlDeviceGetPowerUsage
POWER_INSTANT_FIELD = 186
MISSING = {
    "clock": "whether a clock was reached cannot be seen",
    "clock event reasons": "what holds the clock down is unknown, the guard goes by temperature",
    "temperature": "the guard goes by the clock event reasons",
    "power": "it is left out",
    "energy counter": "energy is integrated from readings of the power, where there are any",
}


def refusal(nvml: Any, what: str, error: Any) -> ClockError:
    """A refusal of NVML in one sentence.

    Args:
        nvml: the module ``pynvml``.
        what: what was tried.
        error: its ``NVMLError``.
    """
    code = error.value
    if code == nvml.NVML_ERROR_NO_PERMISSION:
        return ClockDenied(f"{what}: NVML refuses without the privilege; {HOW_TO_GET_PRIVILEGE}")
    if code in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
        return ClockError(
            "no NVIDIA driver was found on this machine "
            "(libnvidia-ml.so.1 is missing or the driver is not loaded)"
        )
    if code == nvml.NVML_ERROR_GPU_IS_LOST:
        return GpuLost(f"{what}: the GPU is lost (it fell off the bus or was reset)")
    texts = {
        nvml.NVML_ERROR_NOT_SUPPORTED: "this GPU or driver does not support it (a vGPU and a MIG "
        "instance have no clock of their own)",
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND: "the driver is too old to know how",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "driver and NVML library are of different "
        "versions, as after an update without a reboot",
        nvml.NVML_ERROR_RESET_REQUIRED: "the GPU must be reset first (nvidia-smi --gpu-reset)",
        nvml.NVML_ERROR_INVALID_ARGUMENT: "NVML calls the value invalid; "
        "ask for a supported clock (`biscale hw doctor` lists them)",
        nvml.NVML_ERROR_UNKNOWN: "NVML error 999 (unknown); in a container this is what revoked "
        "access to the GPU's device file looks like: start the container anew",
    }
    return ClockError(f"{what}: {texts.get(code, f'NVML error {code} ({error})')}")


class OptionalReadings:
    """Readings that a GPU or a driver may lack."""

    def __init__(self, nvml: Any) -> None:
        """Prepare to read through the module ``pynvml``."""
        self._nvml = nvml
        self._missing: set[tuple[str, str]] = set()
        self._told: set[str] = set()

    def _never(self) -> tuple[int, ...]:
        """Answers that mean "never", not "not now"."""
        nvml = self._nvml
        return (
            nvml.NVML_ERROR_NOT_SUPPORTED,
            nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
            nvml.NVML_ERROR_INVALID_ARGUMENT,
            nvml.NVML_ERROR_NO_PERMISSION,
            nvml.NVML_ERROR_DEPRECATED,
        )

    def lacks(self, what: str, uuid: str, way: int = 0) -> bool:
        """Whether a GPU is known to lack a reading by this way."""
        return (uuid, f"{what} {way}") in self._missing

    def value(self, what: str, uuid: str, *ways: Callable[[], float]) -> float:
        """A reading, NaN where the GPU has none; a way that is missing is never tried again.

        Args:
            what: key of :data:`MISSING`, or any other name for what must not be said here.
            uuid: GPU.
            ways: calls, the best first; each may be missing on this GPU, or fail now.

        Raises:
            ClockError: none gives a value, and one that is there fails now.
        """
        failure: ClockError | None = None
        for k, way in enumerate(ways):
            if self.lacks(what, uuid, k):
                continue
            try:
                return float(way())
            except self._nvml.NVMLError as error:
                if error.value not in self._never():
                    failure = failure or refusal(self._nvml, f"{what} of {uuid}", error)
                    continue
            except AttributeError:  # an old nvidia-ml-py
                pass
            self._missing.add((uuid, f"{what} {k}"))
        if failure is not None:
            raise failure
        if what in MISSING and what not in self._told:
            self._told.add(what)
            warnings.warn(
                f"{uuid}: the driver tells no {what}: {MISSING[what]}", BiscaleWarning, stacklevel=3
            )
        return math.nan

    def instant_power_w(self, handle: Any) -> float:
        """Board power now, W.

        Raises:
            NVMLError: the driver's refusal.
        """
        field = self._nvml.nvmlDeviceGetFieldValues(handle, [POWER_INSTANT_FIELD])[0]
        if field.nvmlReturn != self._nvml.NVML_SUCCESS:
            raise self._nvml.NVMLError(field.nvmlReturn)
        return float(field.value.uiVal) * 1e-3
