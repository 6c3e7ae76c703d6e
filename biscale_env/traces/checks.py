"""What a row of a trace must satisfy, and the one sentence that says where it does not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biscale_env.core.errors import BiscaleError

MAX_TOKENS = int(np.iinfo(np.int32).max)
MAX_REQUESTS = 100_000_000  # what one trace may hold: 1.6 GB

Where = Callable[[int], str]
"""Maps a row index to the words that name the row in an error."""


@dataclass(frozen=True)
class RowName:
    """Names a row by its line where that of the first row is known (not 0), else by its number.

    Requests are counted from 0.
    """

    name: str
    first_line: int = 0

    def __call__(self, i: int) -> str:
        """Words for row ``i``."""
        return (
            f"{self.name}, line {self.first_line + i}"
            if self.first_line
            else f"{self.name}, request {i}"
        )


def check_times(
    arrival_s: NDArray[np.float64],
    where: Where,
    field: str = "arrival_s",
    after_s: float = -np.inf,
    is_sorted: bool = True,
    is_relative: bool = False,
    advice: str = "",
) -> None:
    """Refuse NaN, infinite, negative or unsorted times.

    Args:
        arrival_s: times, shape (n,), s.
        where: names a row.
        field: name of the column.
        after_s: time of the row before the first, s.
        is_sorted: whether unsorted times are refused.
        is_relative: times are counted from the first row, so that a negative one only shows that
            they are unsorted.
        advice: what the user may do about unsorted times, in words.

    Raises:
        BiscaleError: names the first offending row.
    """
    if _are_in_order(arrival_s, after_s):
        return
    bad = ~np.isfinite(arrival_s)
    if bad.any():
        raise BiscaleError(
            f"{where(int(np.argmax(bad)))}: {field} is missing or not a finite number"
        )
    bad = arrival_s < 0
    if bad.any() and not is_relative:
        i = int(np.argmax(bad))
        raise BiscaleError(
            f"{where(i)}: {field} is {arrival_s[i]:g} s; a time must not be negative"
        )
    steps_s = np.diff(arrival_s, prepend=after_s)
    if is_sorted and (steps_s < 0).any():
        i = int(np.argmax(steps_s < 0))
        raise BiscaleError(
            f"{where(i)}: {field} lies {-steps_s[i]:.9g} s before the row above; times must be "
            f"sorted{advice}"
        )


def _are_in_order(time_s: NDArray[np.float64], after_s: float) -> bool:
    """Whether all is well, in one pass: what is not a number compares as out of order."""
    if not time_s.size:
        return True
    least_s = max(after_s, 0.0)
    return bool(time_s[0] >= least_s and time_s[-1] < np.inf and (time_s[1:] >= time_s[:-1]).all())


def check_lengths(
    tokens: ArrayLike, field: str, where: Where, minimum: int = 1, advice: str = ""
) -> None:
    """Refuse lengths that are not whole numbers of at least ``minimum`` tokens.

    Args:
        tokens: lengths of any numeric type, shape (n,).
        field: name of the column.
        where: names a row.
        minimum: smallest length allowed.
        advice: what the user may do about others, in words.

    Raises:
        BiscaleError: names the first offending row.
    """
    values: NDArray[Any] = np.asarray(tokens)
    if values.dtype.kind in "iu" and (
        not values.size or (values.min() >= minimum and values.max() <= MAX_TOKENS)
    ):
        return
    bad = ~np.isfinite(values) | (values < minimum) | (values > MAX_TOKENS)
    if values.dtype.kind == "f":
        bad |= values != np.floor(values)
    if bad.any():
        i = int(np.argmax(bad))
        found = (
            f"is {values[i]:g}" if np.isfinite(values[i]) else "is missing or not a finite number"
        )
        raise BiscaleError(
            f"{where(i)}: {field} {found}; a length must be a whole number from {minimum} to "
            f"{MAX_TOKENS}{advice}"
        )
