"""Compiled: which request goes on with which, by the blocks that they share."""

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.jit import compiled

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]


@compiled
def link_sessions(ids: Ints, starts: Longs, latest: Ints, session: Ints) -> None:
    """Give each request the session of the one that it continues.

    ``latest`` names the latest request with a block, -1 where there was none.
    """
    for r in range(session.size):
        first, stop = starts[r], starts[r + 1]
        k = first
        while k < stop and latest[ids[k]] >= 0:
            k += 1
        if k > first:
            before = latest[ids[k - 1]]
            if 2 * (k - first) >= starts[before + 1] - starts[before]:
                session[r] = session[before]
        for k in range(first, stop):
            latest[ids[k]] = r
