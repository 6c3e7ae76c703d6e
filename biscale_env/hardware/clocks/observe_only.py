"""Reading without writing."""

from biscale_env.hardware.clocks.backend import ClockError, GpuLost
from biscale_env.hardware.clocks.reads_through import StandsBefore


class ObserveOnly(StandsBefore):
    """Reads through another backend and never writes.

    What a policy *would* do is logged, the clocks stay as they are.
    """

    name = "observe"
    can_lock = False

    def supported_mhz(self, uuid: str) -> list[float]:
        """Clocks of the inner backend, MHz; every multiple of 15 where it lists none.

        Nothing is set, so that decisions can be logged on a vGPU too.
        """
        try:
            return super().supported_mhz(uuid)
        except GpuLost:
            raise
        except ClockError:
            return [float(clock) for clock in range(15, 3001, 15)]

    def lock(self, uuid: str, low_mhz: float, high_mhz: float) -> None:
        """Do nothing."""

    def reset(self, uuid: str) -> None:
        """Do nothing."""

    def cap(self, uuid: str, limit_w: float) -> None:
        """Do nothing."""

    def uncap(self, uuid: str) -> None:
        """Do nothing."""
