"""The two ways to hold a GPU back: its clock is locked, or its power is limited.

Operators often may do the second and not the first. Whoever owns a GPU uses one of them, notes
which on disk, and takes back what that one has set.
"""

from collections.abc import Sequence
from typing import Final

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Means
from biscale_env.hardware.clocks.backend import ClockBackend, ClockError, PowerLimits
from biscale_env.hardware.clocks.reads_through import StandsBefore

LOCK: Final = "lock"
CAP: Final = "cap"
MEANS: Final = (LOCK, CAP)


class CappingBackend(StandsBefore):
    """Another backend, used for power limits alone: resetting means the default limit."""

    def __init__(self, inner: ClockBackend) -> None:
        super().__init__(inner)
        self.name, self.can_lock = inner.name, inner.can_lock

    def outstanding(self) -> set[str]:
        """GPUs with a call of the inner backend that has not ended."""
        return self.inner.outstanding()

    def lock(self, uuid: str, low_mhz: float, high_mhz: float) -> None:
        """Refuse: clocks are not locked here."""
        raise ClockError(f"{uuid}: its power is limited here, its clock is not locked")

    def reset(self, uuid: str) -> None:
        """Set the default power limit."""
        self.inner.uncap(uuid)

    def reset_each(self, uuids: Sequence[str]) -> dict[str, ClockError]:
        """Set the default power limits."""
        return self.inner.uncap_each(uuids)

    def cap(self, uuid: str, limit_w: float) -> None:
        """Limit the power, W."""
        self.inner.cap(uuid, limit_w)

    def cap_each(self, uuids: Sequence[str], limit_w: float) -> dict[str, ClockError]:
        """Limit the power of several GPUs, W."""
        return self.inner.cap_each(uuids, limit_w)

    def uncap(self, uuid: str) -> None:
        """Set the default power limit."""
        self.inner.uncap(uuid)


def by_means(backend: ClockBackend, means: str) -> ClockBackend:
    """A backend whose reset takes back what these means have set.

    Args:
        backend: for whichever means.
        means: ``lock`` or ``cap``.

    Raises:
        BiscaleError: other means.
    """
    if means not in MEANS:
        raise BiscaleError(f"unknown means '{means}' of holding a clock: choose lock or cap")
    plain = backend.inner if isinstance(backend, CappingBackend) else backend
    return CappingBackend(plain) if means == CAP else plain


def check_untouched(backend: ClockBackend, uuids: Sequence[str]) -> PowerLimits:
    """The range of limits that all of several GPUs take.

    Raises:
        ClockError: one of them has a limit that somebody else has set: it would be lost at the end,
            when the default comes back.
    """
    ranges = [backend.power_limits(uuid) for uuid in uuids]
    for uuid, known in zip(uuids, ranges, strict=True):
        limit_w = backend.power_limit_w(uuid)
        if limit_w != known.default_w:
            raise ClockError(
                f"somebody has limited the power of {uuid} to {limit_w:g} W, which would be lost: "
                f"set its default of {known.default_w:g} W first, or use other GPUs"
            )
    low_w, high_w = max(r.low_w for r in ranges), min(r.high_w for r in ranges)
    return PowerLimits(low_w, high_w, min(r.default_w for r in ranges))


__all__ = ["CAP", "LOCK", "MEANS", "CappingBackend", "Means", "by_means", "check_untouched"]
