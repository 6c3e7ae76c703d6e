"""Requests coming in: which have arrived, and how fast they have been coming.

Shared by both phases.
"""

from typing import Any

import numpy as np

from biscale_env.core.jit import inlined
from biscale_env.sim.state import RATE_WINDOWS_S, TOKEN_RATE_WINDOW_S, Floats, ShortInts

N_WINDOWS = len(RATE_WINDOWS_S)
EXP_VANISHES = 37.0  # 1 - exp(-37) is 1 in double precision
MIN_AGE_S = 1.0  # assumed: rates are not extrapolated from less than a second


@inlined
def decay_rates(st: Any, now_s: float) -> None:
    """Let the decayed counts age to ``now_s``."""
    dt = now_s - st.rate_time_s
    if dt > 0.0:
        for k in range(N_WINDOWS):
            factor = np.exp(-dt / RATE_WINDOWS_S[k])
            st.rate_sum[k] *= factor
            if RATE_WINDOWS_S[k] == TOKEN_RATE_WINDOW_S:
                st.token_rate_sum *= factor
        st.rate_time_s = now_s


@inlined
def admit_arrivals(st: Any, arrival_s: Floats, tokens: ShortInts | Floats) -> None:
    """Move the tail past every request that has arrived by now; the rate estimates count it."""
    while st.tail < st.end and arrival_s[st.tail] <= st.time_s:
        decay_rates(st, arrival_s[st.tail])
        for k in range(N_WINDOWS):
            st.rate_sum[k] += 1.0 / RATE_WINDOWS_S[k]
        st.token_rate_sum += tokens[st.tail] / TOKEN_RATE_WINDOW_S
        st.queue_tokens += tokens[st.tail]
        st.tail += 1


@inlined
def rate_scale(now_s: float, window_s: float) -> float:
    """Correction of a decayed count for the short history at the start of an episode."""
    age = max(now_s, MIN_AGE_S) / window_s
    return 1.0 / (1.0 - np.exp(-age)) if age < EXP_VANISHES else 1.0
