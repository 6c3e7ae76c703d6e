"""The clock backends by name: the one place that knows all of them."""

from collections.abc import Callable

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks.backend import ClockBackend
from biscale_env.hardware.clocks.fake_gpus import FakeBackend
from biscale_env.hardware.clocks.nvml import NvmlBackend
from biscale_env.hardware.clocks.observe_only import ObserveOnly
from biscale_env.hardware.clocks.zeusd import ZeusdBackend

# name: makes the backend from what follows the colon, "" for nothing
BACKENDS: dict[str, Callable[[str], ClockBackend]] = {
    "nvml": lambda _: NvmlBackend(),
    "zeusd": lambda socket: ZeusdBackend(NvmlBackend(), socket or None),
    "fake": FakeBackend,
}


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
