"""The one formula for latency and power of an engine iteration.

Every function here uses nothing but arithmetic, so the same source serves three callers: NumPy
floats and arrays, compiled code (Numba calls these functions directly) and CasADi expressions.
There is no second copy anywhere.

One iteration of one instance (``n_gpus`` GPUs, tensor parallel) is described by its *work*:

- ``tokens``: rows of the GEMMs: new prompt tokens in prefill, running requests in decode;
- ``attn_work``: attention token-pairs, ``A = sum n_i (n_i / 2 + prefix_i)`` over the prompts (or
  chunks) of the batch, token^2;
- ``cached``: ``C``, KV-cache tokens read by the decoding requests;
- ``n_seq``: requests in the batch (host work grows with it).

Latency is the sum of GEMMs (weights stream from HBM, or compute), experts likewise, attention,
communication, element-wise kernels and host time. HBM is read at its own rate as long as the SMs
ask for enough bytes; below ``stream_knee_ghz`` the rate goes with the clock. Energy of one GPU is a
static part, a clock-tree part, and parts per second of work and per operation that grow with the
square of the core voltage. Voltage is flat below a knee and rises linearly above it (a smooth
hinge). Everything is documented on :class:`Coefficients`: those of the GPU (``GPU_FIELDS``) serve
every LLM on it, the others say what an LLM asks of one GPU.
"""

from typing import Any, Final, NamedTuple

import numpy as np
from numba.extending import register_jitable

from biscale_env.core.roots import bracket, false_position, narrowed

Number = Any  # float, ndarray or CasADi expression
HINGE_WIDTH_GHZ = 0.05  # assumed: rounding of the voltage hinge
CAP_TOLERANCE_W = 1e-7  # of the power at the effective clock
FEW_ROWS = 2048.0  # GEMM rows at which half of ``few_rows_saving`` is left; chosen with the fit


class Coefficients(NamedTuple):
    """Coefficients of one phase of one (GPU, LLM, dtype, TP, EP) configuration.

    Every work term is per GPU. Times of compute are those at ``freq_profile_ghz``, those of HBM are
    the memory's own, without limit by the clock.
    """

    n_gpus: float  # GPUs of the instance (tensor parallel degree)
    freq_profile_ghz: float  # SM clock f0 that the times below are given at
    weights_s: float  # time to stream the dense weights from HBM
    gemm0_s: float  # core-clocked constant time of the GEMM kernels: launch, ramp, tail
    gemm_s_per_token: float  # dense GEMM compute time per row
    experts_s: float  # time to stream all experts that one GPU holds; 0 without experts
    expert_s_per_token: float  # expert GEMM compute time per row
    expert_miss: float  # probability that a row leaves a given expert alone, 1 - k/E
    expert_skew: float  # rows as many as skew * rows touch as many experts as evenly routed ones
    attn0_s: float  # attention, constant part
    attn_prefill_s: float  # attention time per unit of attn_work (compute)
    attn_decode_s: float  # attention time per cached token (HBM)
    window_tokens: float  # sliding window of the windowed attention layers
    window_share: float  # share of the attention layers that are windowed
    comm0_s: float  # all-reduce, constant part
    comm_s_per_token: float  # all-reduce per row
    elem0_s: float  # element-wise kernels, constant part
    elem_s_per_token: float  # element-wise kernels per row
    host0_s: float  # host and framework time per iteration (measured minus kernels)
    host_s_per_seq: float  # host time per request in the batch
    flops_per_token: float  # GEMM operations per row and GPU, chosen experts included
    flops_per_attn: float  # attention operations per unit of attn_work or cached token and GPU
    weight_bytes: float  # dense weights read per iteration and GPU
    expert_bytes: float  # weights of all experts that one GPU holds
    expert_core_bytes: float  # the same as they are multiplied: 4-bit ones are widened to bf16
    bytes_per_token: float  # activation bytes per row and GPU
    kv_bytes_per_token: float  # KV bytes per cached token and GPU
    link_bytes_per_token: float  # NVLink bytes per row and GPU
    energy_factor: float  # energy of work against what the GPU's layer says; 1 where not measured
    stream_knee_ghz: float  # clock at which the SMs can ask for just the bytes that HBM can give
    core_share: float  # share of element-wise and constant attention time that scales with f0/f
    v_knee_ghz: float  # clock up to which the core voltage stays at its minimum
    v_slope_per_ghz: float  # rise of relative voltage per GHz above the knee
    p_static_w: float  # power of a GPU holding a context, clock tree excluded
    p_clock_w_per_ghz: float  # clock-tree power per GHz at minimum voltage
    p_busy_w: float  # extra power while an iteration runs, at minimum voltage
    p_seq_w: float  # extra power in the host time per request, at minimum voltage
    e_flop_j: float  # core energy per operation at minimum voltage, many rows
    few_rows_saving: float  # relative saving of it as rows go to none
    e_byte_j: float  # on-chip energy per byte at minimum voltage
    e_hbm_j: float  # HBM energy per byte (own voltage rail)
    e_link_j: float  # link energy per byte
    p_cap_w: float  # board power limit


GPU_FIELDS: Final = (
    "freq_profile_ghz",
    "stream_knee_ghz",
    "core_share",
    "v_knee_ghz",
    "v_slope_per_ghz",
    "p_static_w",
    "p_clock_w_per_ghz",
    "p_busy_w",
    "p_seq_w",
    "e_flop_j",
    "few_rows_saving",
    "e_byte_j",
    "e_hbm_j",
    "e_link_j",
    "p_cap_w",
)
"""Coefficients that belong to the GPU, whatever runs on it."""
WORK_FIELDS: Final = tuple(name for name in Coefficients._fields if name not in GPU_FIELDS)
"""Coefficients that say what an LLM asks of one GPU."""

COEFFICIENT_DTYPE = np.dtype([(name, np.float64) for name in Coefficients._fields])


@register_jitable
def hinge(x: Number) -> Number:
    """Smooth max(x, 0) from arithmetic alone (GHz)."""
    return 0.5 * (x + (x * x + HINGE_WIDTH_GHZ * HINGE_WIDTH_GHZ) ** 0.5)


@register_jitable
def voltage(c: Any, freq_ghz: Number) -> Number:
    """Core voltage relative to its minimum, dimensionless, at an SM clock in GHz."""
    return 1.0 + c.v_slope_per_ghz * hinge(freq_ghz - c.v_knee_ghz)


@register_jitable
def fourth_root(x: Number) -> Number:
    """Fourth root of a number >= 0; square roots alone, which every caller knows."""
    return (x**0.5) ** 0.5


@register_jitable
def smooth_max(x: Number, y: Number) -> Number:
    """Smooth maximum of two numbers >= 0: at most 19 % above the larger, where they are equal."""
    x2, y2 = 1.0 * x * x, 1.0 * y * y  # tokens are integers, whose fourth power overflows
    return fourth_root(x2 * x2 + y2 * y2)


@register_jitable
def memory_stretch(c: Any, freq_ghz: Number) -> Number:
    """Time of memory-bound work relative to that of HBM alone: a slow core asks slowly."""
    x = c.stream_knee_ghz / freq_ghz
    return fourth_root(1.0 + x * x * x * x)


@register_jitable
def experts_read(c: Any, tokens: Number) -> Number:
    """Share of its experts that a GPU reads for so many rows, 0 to 1.

    A row leaves an expert alone with probability ``expert_miss``; rows are independent.
    """
    return 1.0 - c.expert_miss ** (c.expert_skew * tokens)


@register_jitable
def within_window(c: Any, amount: Number, bound: Number) -> Number:
    """Attention work where windowed layers see no more than ``bound`` of ``amount``, same unit."""
    most = bound + 1e-9  # no work at all is 0 and not 0/0
    return (1.0 - c.window_share) * amount + c.window_share * amount * most / smooth_max(
        amount, most
    )


@register_jitable
def attended(
    c: Any, tokens: Number, attn_work: Number, cached: Number, n_seq: Number
) -> tuple[Number, Number]:
    """Token-pairs and cached tokens that attention reads, averaged over the layers."""
    if c.window_share > 0.0:
        return (
            within_window(c, attn_work, tokens * c.window_tokens),
            within_window(c, cached, n_seq * c.window_tokens),
        )
    return attn_work, cached


class TimeParts(NamedTuple):
    """An iteration's time, cut by what it goes with, s; of the work alone, at no clock yet."""

    stream: Number  # dense weights from HBM
    compute: Number  # dense GEMMs, at the profile clock
    expert_stream: Number  # experts from HBM
    expert_compute: Number  # expert GEMMs, at the profile clock
    clocked: Number  # everything else that goes with the clock, at the profile clock
    memory: Number  # everything else that HBM bounds
    constant: Number  # communication, host, what no clock changes


@register_jitable
def time_parts(
    c: Any, tokens: Number, attn_work: Number, cached: Number, n_seq: Number
) -> TimeParts:
    """Time of an iteration's work by what it goes with."""
    pairs, read = attended(c, tokens, attn_work, cached, n_seq)
    small = c.attn0_s + c.elem0_s + c.elem_s_per_token * tokens
    expert_stream, expert_compute = 0.0, 0.0
    if c.experts_s > 0.0:
        expert_stream = c.experts_s * experts_read(c, tokens)
        expert_compute = c.expert_s_per_token * tokens
    return TimeParts(
        c.weights_s,
        c.gemm_s_per_token * tokens,
        expert_stream,
        expert_compute,
        c.gemm0_s + c.core_share * small + c.attn_prefill_s * pairs,
        c.attn_decode_s * read,
        (1.0 - c.core_share) * small
        + c.comm0_s
        + c.comm_s_per_token * tokens
        + c.host0_s
        + c.host_s_per_seq * n_seq,
    )


class ClockTerms(NamedTuple):
    """What a constant SM clock makes of any work; a simulator keeps it while the clock stands."""

    freq_ghz: Number
    ratio: Number  # core-clocked time relative to that at the profile clock
    stretch: Number  # memory-bound time relative to that of HBM alone
    voltage: Number  # relative to its minimum


@register_jitable
def clock_terms(c: Any, freq_ghz: Number) -> ClockTerms:
    """What an SM clock in GHz makes of any work."""
    return ClockTerms(
        freq_ghz, c.freq_profile_ghz / freq_ghz, memory_stretch(c, freq_ghz), voltage(c, freq_ghz)
    )


@register_jitable
def duration_of(c: Any, t: TimeParts, at: ClockTerms) -> Number:
    """Duration of work in s at a constant SM clock."""
    gemm = smooth_max(t.stream * at.stretch, t.compute * at.ratio)
    if c.experts_s > 0.0:
        gemm = gemm + smooth_max(t.expert_stream * at.stretch, t.expert_compute * at.ratio)
    return gemm + t.clocked * at.ratio + t.memory * at.stretch + t.constant


@register_jitable
def latency_s(
    c: Any, tokens: Number, attn_work: Number, cached: Number, n_seq: Number, freq_ghz: Number
) -> Number:
    """Duration in seconds of one iteration at a constant SM clock in GHz.

    No power cap; see ``effective_freq_ghz``.
    """
    return duration_of(c, time_parts(c, tokens, attn_work, cached, n_seq), clock_terms(c, freq_ghz))


@register_jitable
def work_energy_j(
    c: Any, tokens: Number, attn_work: Number, cached: Number, n_seq: Number
) -> tuple[Number, Number]:
    """Energy per GPU of the work itself: (part that scales with V^2, part that does not), J."""
    pairs, read = attended(c, tokens, attn_work, cached, n_seq)
    flops = c.flops_per_token * tokens + c.flops_per_attn * (pairs + read)
    moved = c.weight_bytes + c.bytes_per_token * tokens + c.kv_bytes_per_token * read
    on_chip = moved
    if c.experts_s > 0.0:
        share = experts_read(c, tokens)
        moved = moved + c.expert_bytes * share
        on_chip = on_chip + c.expert_core_bytes * share
    per_flop = c.e_flop_j * (1.0 - c.few_rows_saving * FEW_ROWS / (FEW_ROWS + tokens))
    per_request = c.p_seq_w * c.host_s_per_seq * n_seq  # it is not idle time, says measured power
    core = per_flop * flops + c.e_byte_j * on_chip + per_request
    fixed = c.e_hbm_j * moved + c.e_link_j * c.link_bytes_per_token * tokens
    return c.energy_factor * core, c.energy_factor * fixed


@register_jitable
def waiting_w(c: Any, freq_ghz: Number, v: Number) -> Number:
    """Power per GPU in W without work, at a clock in GHz and its relative voltage."""
    return c.p_static_w + c.p_clock_w_per_ghz * freq_ghz * v * v


@register_jitable
def idle_power_w(c: Any, freq_ghz: Number) -> Number:
    """Power per GPU in W of an instance that waits at this clock with its context loaded."""
    return waiting_w(c, freq_ghz, voltage(c, freq_ghz))


@register_jitable
def energy_of(c: Any, core_j: Number, fixed_j: Number, time_s: Number, at: ClockTerms) -> Number:
    """Energy per GPU in J of work that takes ``time_s`` at a constant SM clock.

    Args:
        c: coefficients.
        core_j: energy of the work that scales with V^2, J.
        fixed_j: energy of the work that does not, J.
        time_s: duration, s.
        at: of the clock.
    """
    v = at.voltage
    busy = c.energy_factor * c.p_busy_w * time_s
    return time_s * waiting_w(c, at.freq_ghz, v) + v * v * (core_j + busy) + fixed_j


@register_jitable
def iteration_energy_j(
    c: Any,
    tokens: Number,
    attn_work: Number,
    cached: Number,
    n_seq: Number,
    time_s: Number,
    freq_ghz: Number,
) -> Number:
    """Energy per GPU in J of an iteration that takes ``time_s`` at a constant SM clock in GHz."""
    core, fixed = work_energy_j(c, tokens, attn_work, cached, n_seq)
    return energy_of(c, core, fixed, time_s, clock_terms(c, freq_ghz))


@register_jitable
def power_w(
    c: Any, tokens: Number, attn_work: Number, cached: Number, n_seq: Number, freq_ghz: Number
) -> Number:
    """Mean power per GPU in W over one iteration at a constant SM clock in GHz, before the cap."""
    t = latency_s(c, tokens, attn_work, cached, n_seq, freq_ghz)
    return iteration_energy_j(c, tokens, attn_work, cached, n_seq, t, freq_ghz) / t


@register_jitable
def _at_clock(
    c: Any, parts: TimeParts, core_j: float, fixed_j: float, at: ClockTerms
) -> tuple[float, float, float]:
    """Duration, s, and energy, J, of work at a clock, and how far its power is above the cap, W."""
    time = duration_of(c, parts, at)
    joules = energy_of(c, core_j, fixed_j, time, at)
    return time, joules, joules / time - c.p_cap_w


@register_jitable
def iteration_at(
    c: Any,
    tokens: float,
    attn_work: float,
    cached: float,
    n_seq: float,
    at: ClockTerms,
    freq_min_ghz: float,
) -> tuple[float, float, float]:
    """What an iteration does at a requested clock: effective clock, GHz; duration, s; energy, J.

    Floats only; energy per GPU. The effective clock is the highest up to the request at which the
    iteration's mean power keeps the cap. Power rises in the clock, so the crossing is bracketed by
    ``freq_min_ghz`` and the request and found by :mod:`biscale_env.core.roots` to 1e-7 W. At the
    lowest clock the hardware has nothing left to lower: it is returned even above the cap.
    """
    parts = time_parts(c, tokens, attn_work, cached, n_seq)
    core, fixed = work_energy_j(c, tokens, attn_work, cached, n_seq)
    time, joules, excess_hi = _at_clock(c, parts, core, fixed, at)
    if joules <= c.p_cap_w * time or at.freq_ghz <= freq_min_ghz:
        return at.freq_ghz, time, joules
    hi, f = at.freq_ghz, freq_min_ghz
    time, joules, excess = _at_clock(c, parts, core, fixed, clock_terms(c, f))
    if excess < 0.0:
        b = bracket(f, excess, hi, excess_hi)
        for _ in range(60):
            f = false_position(b)
            time, joules, excess = _at_clock(c, parts, core, fixed, clock_terms(c, f))
            if abs(excess) < CAP_TOLERANCE_W or b.hi - b.lo < 1e-10:
                break
            b = narrowed(b, f, excess)
    return f, time, joules


@register_jitable
def iteration_under_cap(
    c: Any,
    tokens: float,
    attn_work: float,
    cached: float,
    n_seq: float,
    freq_ghz: float,
    freq_min_ghz: float,
) -> tuple[float, float, float]:
    """As :func:`iteration_at`, for a clock in GHz."""
    at = clock_terms(c, freq_ghz)
    return iteration_at(c, tokens, attn_work, cached, n_seq, at, freq_min_ghz)


@register_jitable
def effective_freq_ghz(
    c: Any,
    tokens: float,
    attn_work: float,
    cached: float,
    n_seq: float,
    freq_ghz: float,
    freq_min_ghz: float,
) -> float:
    """Highest clock <= request at which the iteration's mean power keeps the cap (GHz).

    Floats only; see :func:`iteration_under_cap`.
    """
    return iteration_under_cap(c, tokens, attn_work, cached, n_seq, freq_ghz, freq_min_ghz)[0]
