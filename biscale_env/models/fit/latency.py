"""Latency coefficients from a profile table.

Each kernel family on its own column, then all together on the total.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from biscale_env.models import physics
from biscale_env.models.fit.profile_table import ProfileTable
from biscale_env.models.physics import Coefficients

Floats = NDArray[np.float64]
Rows = NDArray[np.bool_] | NDArray[np.intp]
# relative error beyond which a point counts linearly instead of quadratically (kernel tables have
# outliers)
ERROR_SCALE = 0.02
SMALLEST_S = 1e-15  # stands for zero in logarithms
TINY = 1e-9  # keeps a start that lies on its bound inside
LEAST_SKEW = 0.1  # assumed: fewer rows do not touch so many experts, whatever the routing
# relative difference of the error up to which a table does not tell a stream: what a constant hides
# would land wherever the processor's rounding sends it
UNTOLD = 1e-6
NO_STREAM_S = 1e-9  # what such a stream is then: nothing beside any kernel, and no special case
LOWER = {"expert_skew": LEAST_SKEW}  # coefficients with a lower bound above zero
UPPER = {"core_share": 1.0, "expert_skew": 1.0}  # coefficients with an upper bound
LATENCY_FIELDS = (
    "weights_s",
    "gemm_s_per_token",
    "experts_s",
    "expert_s_per_token",
    "expert_skew",
    "attn0_s",
    "comm0_s",
    "comm_s_per_token",
    "elem0_s",
    "elem_s_per_token",
)
WORK_FIELD = {"prefill": "attn_prefill_s", "decode": "attn_decode_s"}


def _relative_nnls(columns: Sequence[Floats], target: Floats) -> Floats:
    """Non-negative least squares on relative errors."""
    return nnls(np.column_stack(columns) / target[:, None], np.ones_like(target))[0]


def _fit_gemm(tokens: Floats, seconds: Floats, constant_s: float) -> tuple[float, float]:
    """Time of the weight stream and compute time per row, s, beside a constant.

    A stream that the table does not tell, since the constant hides it, is :data:`NO_STREAM_S`.
    """

    def residual(q: Floats) -> Floats:
        time = physics.smooth_max(np.exp(q[0]), np.exp(q[1]) * tokens)
        return np.asarray((time + constant_s) / seconds - 1.0)

    least = max(float(seconds.min()) - constant_s, 0.3 * float(seconds.min()))
    start = np.log([least, seconds.max() / tokens.max()])
    q = least_squares(
        residual, start, loss="soft_l1", f_scale=ERROR_SCALE, xtol=1e-14, ftol=1e-14, gtol=1e-14
    ).x
    without = np.array([np.log(NO_STREAM_S), q[1]])
    q = without if _is_no_worse(residual(without), residual(q)) else q
    return float(np.exp(q[0])), float(np.exp(q[1]))


def _is_no_worse(one: Floats, other: Floats) -> bool:
    """Whether residuals are as good as others, to :data:`UNTOLD`, as ``least_squares`` counts."""
    cost, least = (np.sum(np.sqrt(1.0 + (r / ERROR_SCALE) ** 2) - 1.0) for r in (one, other))
    return bool(cost <= least * (1.0 + UNTOLD))


def _fit_experts(tokens: Floats, seconds: Floats, expert_miss: float) -> dict[str, float]:
    """Time of the stream of all experts, compute time per row, s, and the skew of the routing.

    Beside them a constant, ``elem0_s``: sorting rows by expert and launching one GEMM per expert
    take their time whatever the number of rows. The least error of several starts, since few rows
    alone tell a skew from a constant. A stream that the table does not tell is
    :data:`NO_STREAM_S`, its skew the least, which prefill's tables tell where they tell one.
    """

    def residual(q: Floats) -> Floats:
        share = 1.0 - expert_miss ** (np.exp(q[2]) * tokens)
        time = physics.smooth_max(np.exp(q[0]) * share, np.exp(q[1]) * tokens)
        return np.asarray((time + np.exp(q[3])) / seconds - 1.0)

    per_row, least = np.log(seconds.max() / tokens.max()), np.log(0.5 * seconds.min())
    bounds = (
        np.array([-np.inf, -np.inf, np.log(LEAST_SKEW), -np.inf]),
        np.array([np.inf, np.inf, 0.0, np.inf]),
    )
    found = [
        least_squares(
            residual,
            np.array([np.log(np.median(seconds) * part), per_row, skew, least]),
            bounds=bounds,
            loss="soft_l1",
            f_scale=ERROR_SCALE,
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
        )
        for part in (0.3, 1.0)
        for skew in (-0.2, -1.0, -2.0)
    ]
    q = min(found, key=lambda s: float(s.cost)).x
    without = np.array([np.log(NO_STREAM_S), q[1], np.log(LEAST_SKEW), q[3]])
    q = without if _is_no_worse(residual(without), residual(q)) else q
    names = ("experts_s", "expert_s_per_token", "expert_skew", "elem0_s")
    return dict(zip(names, np.exp(q).tolist(), strict=True))


def fit_components(
    table: ProfileTable, train: NDArray[np.bool_], start: Coefficients
) -> dict[str, float]:
    """Fit every kernel family to its own column.

    The part of the attention column that grows with the tokens (projections' rotations, KV writes)
    has the same form as the element-wise kernels and is kept with them.

    Args:
        table: kernel times.
        train: rows to use.
        start: gives what is not fitted: the constant of the GEMMs, windows, experts per token, the
            GPU's clocks.
    """
    work = table.work
    n, one = work.tokens[train], np.ones(int(train.sum()))
    pairs, read = physics.attended(start, *work.as_tuple())
    quadratic = (pairs if table.phase == "prefill" else read)[train]
    weights_s, gemm_s = _fit_gemm(n, table.column("gemm_s")[train], start.gemm0_s)
    hbm = 1.0 / float(physics.memory_stretch(start, start.freq_profile_ghz))  # times of HBM alone
    found = {"weights_s": weights_s * hbm, "gemm_s_per_token": gemm_s}
    if start.expert_bytes > 0:
        found |= _fit_experts(n, table.column("expert_s")[train], start.expert_miss)
        found["experts_s"] *= hbm
    attention = _relative_nnls([one, n, quadratic], table.column("attn_s")[train])
    comm = _relative_nnls([one, n], table.column("comm_s")[train]) if table.tp > 1 else np.zeros(2)
    elem = _relative_nnls([one, n], table.column("elem_s")[train])
    sorting_s = found.pop("elem0_s", 0.0)
    return found | {
        "attn0_s": float(attention[0]),
        WORK_FIELD[table.phase]: float(attention[2]) * (hbm if table.phase == "decode" else 1.0),
        "comm0_s": float(comm[0]),
        "comm_s_per_token": float(comm[1]),
        "elem0_s": float(elem[0]) + sorting_s,
        "elem_s_per_token": float(elem[1] + attention[1]),
    }


def predict_s(c: Coefficients, table: ProfileTable, freq_ghz: Floats | float) -> Floats:
    """Latency of every row, s, without the power cap."""
    return np.asarray(physics.latency_s(c, *table.work.as_tuple(), freq_ghz))


def refine(
    start: Coefficients,
    fields: Sequence[str],
    table: ProfileTable,
    train: Rows,
    freq_ghz: Floats,
    sigma: float,
) -> Coefficients:
    """Fit several coefficients together to ``latency_s``, relative errors, held near their start.

    Args:
        start: coefficients to begin with.
        fields: names of the coefficients to move; those that are zero stay.
        table: the rows with their total latency.
        train: rows to use: a mask, or indices (with repetitions in a bootstrap).
        freq_ghz: clock of every row, GHz.
        sigma: how far the logarithm of a coefficient may move for a penalty that equals one point's
            error of ``ERROR_SCALE``.

    Returns:
        Moved coefficients.
    """
    moved = [f for f in fields if getattr(start, f) > SMALLEST_S]
    if not moved:
        return start
    origin = np.array([getattr(start, f) for f in moved])
    tokens, attn_work, cached, n_seq = (axis[train] for axis in table.work.as_tuple())
    target, clock = table.column("latency_s")[train], freq_ghz[train]

    def unpack(q: Floats) -> Coefficients:
        return start._replace(**dict(zip(moved, (origin * np.exp(q)).tolist(), strict=True)))

    def residual(q: Floats) -> Floats:
        error = physics.latency_s(unpack(q), tokens, attn_work, cached, n_seq, clock) / target - 1.0
        return np.concatenate([error, q * (ERROR_SCALE / sigma * np.sqrt(len(target)))])

    bottom = np.array(
        [np.log(LOWER[f] / getattr(start, f)) - TINY if f in LOWER else -np.inf for f in moved]
    )
    top = np.array(
        [np.log(UPPER[f] / getattr(start, f)) + TINY if f in UPPER else np.inf for f in moved]
    )
    solution = least_squares(
        residual,
        np.zeros(len(moved)),
        bounds=(bottom, top),
        loss="soft_l1",
        f_scale=ERROR_SCALE,
        xtol=1e-14,
        ftol=1e-14,
        gtol=1e-14,
    )
    return unpack(solution.x)


def mape(predicted: Floats, measured: Floats) -> float:
    """Mean absolute relative error."""
    return float(np.mean(np.abs(predicted / measured - 1.0)))
