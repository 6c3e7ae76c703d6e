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

Latency is the sum of GEMM (weights stream from HBM, or compute), attention, communication,
element-wise kernels and host time. Energy of one GPU is a static part, a clock-tree part, and
energy per operation that grows with the square of the core voltage. Voltage is flat below a knee
and rises linearly above it (a smooth hinge). All coefficients are documented on
:class:`Coefficients`.
"""

from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from biscale_env.core.roots import bracket, false_position, narrowed

Number = Any  # float, ndarray or CasADi expression
HINGE_WIDTH_GHZ = 0.05  # assumed: rounding of the voltage and bandwidth hinges


class Coefficients(NamedTuple):
    """Coefficients of one phase of one (GPU, LLM, dtype, TP) configuration.

    Every work term is per GPU.
    """

    n_gpus: float  # GPUs of the instance (tensor parallel degree)
    freq_profile_ghz: float  # SM clock f0 at which the latency profile was taken
    weights_s: float  # time to stream the weights from HBM
    mem_loss_per_ghz: float  # relative slow-down of memory-bound time per GHz below mem_knee_ghz
    mem_knee_ghz: float  # clock below which HBM bandwidth can no longer be saturated
    gemm_s_per_token: float  # GEMM compute time per row at f0
    attn0_s: float  # attention, constant part
    attn_prefill_s: float  # attention time per unit of attn_work at f0 (compute)
    attn_decode_s: float  # attention time per cached token (HBM)
    comm0_s: float  # all-reduce, constant part
    comm_s_per_token: float  # all-reduce per row
    elem0_s: float  # element-wise kernels, constant part
    elem_s_per_token: float  # element-wise kernels per row
    core_share: float  # share of element-wise and constant attention time that scales with f0/f
    host0_s: float  # host and framework time per iteration (measured minus kernels)
    host_s_per_seq: float  # host time per request in the batch
    v_knee_ghz: float  # clock up to which the core voltage stays at its minimum
    v_slope_per_ghz: float  # rise of relative voltage per GHz above the knee
    p_static_w: float  # power of a GPU holding a context, clock tree excluded
    p_clock_w_per_ghz: float  # clock-tree power per GHz at minimum voltage
    p_busy_w: float  # extra power while an iteration runs
    flops_per_token: float  # GEMM floating point operations per row and GPU
    flops_per_attn: float  # attention operations per unit of attn_work or cached token and GPU
    weight_bytes: float  # weights read per iteration and GPU
    bytes_per_token: float  # activation bytes per row and GPU
    kv_bytes_per_token: float  # KV bytes per cached token and GPU
    link_bytes_per_token: float  # NVLink bytes per row and GPU
    e_flop_j: float  # core energy per operation at minimum voltage
    e_byte_j: float  # on-chip energy per byte at minimum voltage
    e_hbm_j: float  # HBM energy per byte (own voltage rail)
    e_link_j: float  # link energy per byte
    p_cap_w: float  # board power limit


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
def memory_stretch(c: Any, freq_ghz: Number) -> Number:
    """Factor >= 1 on memory-bound time: a slow core cannot keep HBM busy."""
    return 1.0 + c.mem_loss_per_ghz * hinge(c.mem_knee_ghz - freq_ghz)


@register_jitable
def latency_s(
    c: Any, tokens: Number, attn_work: Number, cached: Number, n_seq: Number, freq_ghz: Number
) -> Number:
    """Duration in seconds of one iteration at a constant SM clock in GHz.

    No power cap; see ``effective_freq_ghz``.
    """
    ratio = c.freq_profile_ghz / freq_ghz
    stretch = memory_stretch(c, freq_ghz)
    core = c.core_share * ratio + 1.0 - c.core_share
    stream = c.weights_s * stretch
    compute = c.gemm_s_per_token * tokens * ratio
    stream2 = stream * stream
    compute2 = compute * compute
    gemm = ((stream2 * stream2 + compute2 * compute2) ** 0.5) ** 0.5
    attention = (
        c.attn0_s * core + c.attn_prefill_s * attn_work * ratio + c.attn_decode_s * cached * stretch
    )
    communication = c.comm0_s + c.comm_s_per_token * tokens
    elementwise = (c.elem0_s + c.elem_s_per_token * tokens) * core
    host = c.host0_s + c.host_s_per_seq * n_seq
    return gemm + attention + communication + elementwise + host


@register_jitable
def work_energy_j(c: Any, tokens: Number, attn_work: Number, cached: Number) -> Number:
    """Energy per GPU of the work itself: (part that scales with V^2, part that does not), J."""
    flops = c.flops_per_token * tokens + c.flops_per_attn * (attn_work + cached)
    moved = c.weight_bytes + c.bytes_per_token * tokens + c.kv_bytes_per_token * cached
    core = c.e_flop_j * flops + c.e_byte_j * moved
    return core, c.e_hbm_j * moved + c.e_link_j * c.link_bytes_per_token * tokens


@register_jitable
def idle_power_w(c: Any, freq_ghz: Number) -> Number:
    """Power per GPU in W of an instance that waits at this clock with its context loaded."""
    v = voltage(c, freq_ghz)
    return c.p_static_w + c.p_clock_w_per_ghz * freq_ghz * v * v


@register_jitable
def iteration_energy_j(
    c: Any, tokens: Number, attn_work: Number, cached: Number, time_s: Number, freq_ghz: Number
) -> Number:
    """Energy per GPU in J of an iteration that takes ``time_s`` at a constant SM clock in GHz."""
    v = voltage(c, freq_ghz)
    core, fixed = work_energy_j(c, tokens, attn_work, cached)
    return time_s * (idle_power_w(c, freq_ghz) + c.p_busy_w) + v * v * core + fixed


@register_jitable
def power_w(
    c: Any, tokens: Number, attn_work: Number, cached: Number, n_seq: Number, freq_ghz: Number
) -> Number:
    """Mean power per GPU in W over one iteration at a constant SM clock in GHz, before the cap."""
    t = latency_s(c, tokens, attn_work, cached, n_seq, freq_ghz)
    return iteration_energy_j(c, tokens, attn_work, cached, t, freq_ghz) / t


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

    Floats only.

    Power rises in the clock, so the crossing is bracketed by ``freq_min_ghz`` and the request and
    found by :mod:`biscale_env.core.roots` to 1e-10 GHz. At the lowest clock the hardware
    has nothing left to lower: it is returned even above the cap.
    """
    hi = freq_ghz
    excess_hi = power_w(c, tokens, attn_work, cached, n_seq, hi) - c.p_cap_w
    if excess_hi <= 0.0 or hi <= freq_min_ghz:
        return hi
    lo = freq_min_ghz
    excess_lo = power_w(c, tokens, attn_work, cached, n_seq, lo) - c.p_cap_w
    if excess_lo >= 0.0:
        return lo
    b = bracket(lo, excess_lo, hi, excess_hi)
    mid = lo
    for _ in range(60):
        mid = false_position(b)
        excess = power_w(c, tokens, attn_work, cached, n_seq, mid) - c.p_cap_w
        if abs(excess) < 1e-7 or b.hi - b.lo < 1e-10:
            break
        b = narrowed(b, mid, excess)
    return mid
