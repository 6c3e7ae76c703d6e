"""What backends have in common that read through another one."""

from biscale_env.hardware.clocks.backend import (
    ClockBackend,
    ClockReading,
    GpuDevice,
    PowerLimits,
)


class ReadsThrough(ClockBackend):
    """Lists GPUs and reads them through ``inner``; how clocks are written is left open."""

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

    def unreachable(self) -> dict[str, str]:
        """GPUs that the inner backend cannot open."""
        return self.inner.unreachable()

    def close(self) -> None:
        """Close the inner backend."""
        self.inner.close()


class StandsBefore(ReadsThrough):
    """Reads power limits of the inner backend too, and reaches what that one reaches."""

    def reaches(self, uuid: str) -> bool:
        """Whether the inner backend can address a GPU."""
        return self.inner.reaches(uuid)

    def power_limits(self, uuid: str) -> PowerLimits:
        """Power limits of the inner backend, W."""
        return self.inner.power_limits(uuid)

    def power_limit_w(self, uuid: str) -> float:
        """Power limit of the inner backend, W."""
        return self.inner.power_limit_w(uuid)
