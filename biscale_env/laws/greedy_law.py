"""BiScale's search for the prefill clocks (arXiv 2602.18755).

Start all projected batches at the highest clock and greedily lower them. The order of lowering is
not published; assumed: the step that saves most energy per second added.
"""

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.jit import inlined

TIME_TOL_S = 1e-12
# relative: two levels above the power cap run alike but for the rounding of the search for the
# effective clock
SAME = 1e-6
ABOVE_CAP_GAIN = 1e-12  # J/s, below any real gain: such steps come last


@inlined
def room_s(
    latency: NDArray[np.float64],
    level: NDArray[np.int64],
    deadline_s: NDArray[np.float64],
    stage: int,
) -> float:
    """Time by which a batch may be prolonged without missing a deadline that is met now, s.

    0 before a missed one.
    """
    t = 0.0
    room = np.inf
    for k in range(level.size):
        t += latency[k, level[k]]
        if k >= stage:
            room = min(room, max(deadline_s[k] - t, 0.0))
    return room


@inlined
def gain_of_lowering(
    latency: NDArray[np.float64], energy: NDArray[np.float64], level: NDArray[np.int64], k: int
) -> float:
    """Energy saved per second added when batch ``k`` goes down one level, J/s.

    0 where it cannot go down or saves nothing; least where both levels lie above the power cap.
    """
    now = level[k]
    if now == 0 or latency[k, now] <= 0.0:
        return 0.0
    longer = latency[k, now - 1] - latency[k, now]
    saved = energy[k, now] - energy[k, now - 1]
    if abs(saved) <= SAME * energy[k, now] and abs(longer) <= SAME * latency[k, now]:
        return ABOVE_CAP_GAIN
    return float(saved / max(longer, 1e-9)) if saved > 0.0 else 0.0


@inlined
def lower_greedily(
    latency: NDArray[np.float64],
    energy: NDArray[np.float64],
    deadline_s: NDArray[np.float64],
    level: NDArray[np.int64],
) -> int:
    """Lower one batch by one level at a time, the one that saves most energy per second added.

    A step must meet every deadline that is met now. Between two levels above the power cap there is
    no difference but rounding: such a step is always allowed, and last in order.

    Args:
        latency: of each batch at each level, (K, N), s; 0 where there is no batch.
        energy: likewise, J.
        deadline_s: by which each batch must be done, (K,), s from now; large where there is none.
        level: the result, (K,).

    Returns:
        Number of moves.
    """
    top = latency.shape[1] - 1
    for k in range(level.size):
        level[k] = top
    moves = 0
    while True:
        best, best_gain = -1, 0.0
        for k in range(level.size):
            gain = gain_of_lowering(latency, energy, level, k)
            if gain <= best_gain:
                continue
            longer = latency[k, level[k] - 1] - latency[k, level[k]]
            above_cap = gain == ABOVE_CAP_GAIN
            if above_cap or longer <= room_s(latency, level, deadline_s, k) + TIME_TOL_S:
                best, best_gain = k, gain
        if best < 0:
            return moves
        level[best] -= 1
        moves += 1
