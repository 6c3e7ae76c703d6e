"""Root of a rising function in an interval: false position with the Illinois rule.

An interval ``[lo, hi]`` with ``f(lo) < 0 < f(hi)`` is cut where the chord between its ends crosses
zero::

    x = (lo f(hi) - hi f(lo)) / (f(hi) - f(lo))

The end whose sign ``f(x)`` shares moves to ``x``. Where the same end moves twice in a row, the
value of the other one is halved (the Illinois rule), so that the other end moves too: convergence
of order 1.44 without a derivative, and the root stays inside up to rounding (M. Dowell and P.
Jarratt, "A modified regula falsi method for computing the root of an equation", BIT 11, 1971). For
a falling function give the negated values.

The caller owns the loop, since every one stops by rules of its own::

    b = bracket(lo, at_lo, hi, at_hi)
    for _ in range(60):
        x = false_position(b)
        at = f(x)
        if abs(at) < tolerance:
            break
        b = narrowed(b, x, at)
"""

from typing import NamedTuple

from biscale_env.core.jit import inlined


class Bracket(NamedTuple):
    """An interval that holds the root.

    Attributes:
        lo: its low end.
        at_lo: value there (halved by the rule), negative.
        hi: its high end.
        at_hi: value there (halved by the rule), positive.
        side: which end moved last: 1 the high one, -1 the low one, 0 none yet.
    """

    lo: float
    at_lo: float
    hi: float
    at_hi: float
    side: int


@inlined
def bracket(lo: float, at_lo: float, hi: float, at_hi: float) -> Bracket:
    """The interval to begin with; ``at_lo < 0 < at_hi``."""
    return Bracket(lo, at_lo, hi, at_hi, 0)


@inlined
def false_position(b: Bracket) -> float:
    """Where the chord between the ends crosses zero."""
    return (b.lo * b.at_hi - b.hi * b.at_lo) / (b.at_hi - b.at_lo)


@inlined
def narrowed(b: Bracket, x: float, at: float) -> Bracket:
    """The interval after the value ``at`` was found at ``x``."""
    if at > 0.0:
        return Bracket(b.lo, 0.5 * b.at_lo if b.side == 1 else b.at_lo, x, at, 1)
    return Bracket(x, at, b.hi, 0.5 * b.at_hi if b.side == -1 else b.at_hi, -1)
