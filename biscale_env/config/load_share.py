"""A load as a share of capacity, and the usual slip: per cent."""

from typing import Final

from biscale_env.core.errors import BiscaleError

# From five times the capacity on a queue only grows, and nobody writes less than 5 for 5 %.
LEAST_PERCENT: Final = 5.0


def checked_load(load: float) -> float:
    """A load, unless it looks like per cent.

    Args:
        load: share of the capacity, 1 for all of it.

    Raises:
        BiscaleError: asks whether the hundredth was meant.
    """
    if load >= LEAST_PERCENT:
        raise BiscaleError(
            f"a load of {load:g} is {load:g} times the capacity: was {load / 100:g} meant?"
        )
    return load
