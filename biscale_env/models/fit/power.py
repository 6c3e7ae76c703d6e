"""Energy coefficients: bounded least squares on measured power.

Linear, because the formula is linear in them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

from biscale_env.models import physics
from biscale_env.models.fit.evidence import (
    ENERGY_NAMES,
    SAMPLED_COEFFICIENTS,
    Evidence,
    ParameterSample,
)
from biscale_env.models.fit.profile_table import IterationWork
from biscale_env.models.fit.serving_evidence import (
    MS,
    ColocatedServer,
    capped_clock_ghz,
    infer_server,
    mixture,
)
from biscale_env.models.physics import Coefficients

Floats = NDArray[np.float64]
Kernels = Mapping[tuple[str, str, int], Coefficients]
# the clock under the cap depends on the energies; the alternation settles to 1e-4 in about four
# rounds
CAP_ROUNDS = 6
SHAPE_BATCH, SHAPE_CLOCK_GHZ = 8.0, 0.78  # where `decode_power_share_780` is defined
SCALE = {
    "e_flop_j": 1e-12,
    "e_byte_j": 1e-12,
    "e_hbm_j": 1e-12,
    "e_link_j": 1e-12,
}  # keeps the system well conditioned
NOT_GEMM = {
    "attn0_s": 0.0,
    "attn_prefill_s": 0.0,
    "attn_decode_s": 0.0,
    "comm0_s": 0.0,
    "comm_s_per_token": 0.0,
    "elem0_s": 0.0,
    "elem_s_per_token": 0.0,
    "host0_s": 0.0,
    "host_s_per_seq": 0.0,
    "link_bytes_per_token": 0.0,
}


@dataclass(frozen=True)
class EnergyFit:
    """Result of one energy fit.

    Attributes:
        values: energy coefficients for bf16.
        e_flop_fp8_j: energy per fp8 operation, J (equals the bf16 one where no fp8 kernels were
            given).
        server: host time and prompts that the serving points imply.
    """

    values: dict[str, float]
    e_flop_fp8_j: float
    server: ColocatedServer

    def apply(self, c: Coefficients, dtype: str) -> Coefficients:
        """Coefficients with these energies."""
        values = dict(self.values)
        if dtype == "fp8":
            values["e_flop_j"] = self.e_flop_fp8_j
        return c._replace(**values)


def with_sample(
    c: Coefficients, sample: ParameterSample, phase: str, server: ColocatedServer | None = None
) -> Coefficients:
    """Coefficients in one member of the sample: clocks, shares, and host time."""
    values = {name: sample[name] for name in SAMPLED_COEFFICIENTS}
    if phase == "prefill":
        values |= {"host0_s": sample["prefill_host_s"], "host_s_per_seq": 0.0}
    out = c._replace(**values)
    return server.apply(out) if server is not None and phase == "decode" else out


def energy_columns(energy: Callable[[Coefficients], Floats | float], c: Coefficients) -> Floats:
    """Derivative of an energy (or power) by each energy coefficient.

    The formula with one of them at a time.
    """
    nothing = c._replace(**dict.fromkeys(ENERGY_NAMES, 0.0))
    return np.array([energy(nothing._replace(**{n: SCALE.get(n, 1.0)})) for n in ENERGY_NAMES]).T


@dataclass
class LinearSystem:
    """Weighted linear equations for the energy coefficients, in the units of ``SCALE``."""

    rows: list[Floats]
    targets: list[float]
    sigmas: list[float]

    def add(self, row: Floats, target: float, sigma: float) -> None:
        """One equation ``row . x = target`` with its standard deviation, in the target's unit."""
        self.rows.append(row)
        self.targets.append(target)
        self.sigmas.append(sigma)

    def weighted(self) -> tuple[Floats, Floats]:
        """Matrix and right-hand side, every equation divided by its standard deviation."""
        weight = 1.0 / np.array(self.sigmas)
        return np.array(self.rows) * weight[:, None], np.array(self.targets) * weight


def _add_serving(
    s: LinearSystem,
    c: Coefficients,
    server: ColocatedServer,
    ev: Evidence,
    freq_min_ghz: float,
    capped: bool,
) -> None:
    freq_ghz = ev.serving.freq_mhz * MS
    for p in (p for p in ev.serving.points if p.fitted):
        mix = mixture(p, server.prompt_tokens, server.context_tokens)
        w = mix.work
        f = (
            capped_clock_ghz(c, w, freq_ghz, freq_min_ghz)
            if capped
            else np.full(w.tokens.shape, freq_ghz)
        )
        time = physics.latency_s(c, *w.as_tuple(), f)

        def energy(
            k: Coefficients, w: IterationWork = w, time: Floats = time, f: Floats = f
        ) -> Floats:
            return physics.iteration_energy_j(
                k, w.tokens, w.attn_work, w.cached, time, f
            ) * np.ones_like(time)

        s.add(
            mix.share @ energy_columns(energy, c) / float(mix.share @ time),
            p.power_w,
            ev.sigma.serving * p.power_w,
        )


def gemm_only(c: Coefficients) -> Coefficients:
    """Coefficients of the same engine with nothing but its GEMMs."""
    return c._replace(**NOT_GEMM)


def _gemm_columns(c: Coefficients, rows: Floats, clock_ghz: float) -> Floats:
    def power(k: Coefficients) -> Floats:
        return physics.power_w(k, rows, 0.0, 0.0, 1.0, clock_ghz)

    return energy_columns(power, gemm_only(c))


def _add_gemm_cap(
    s: LinearSystem, kernels: Kernels, sample: ParameterSample, ev: Evidence, dtype: str
) -> None:
    rows = np.array(ev.gemm_cap.rows, dtype=np.float64)
    for (phase, dt, _), c in kernels.items():
        if phase == "prefill" and dt == dtype:
            for row in _gemm_columns(with_sample(c, sample, phase), rows, sample["gemm_clock_ghz"]):
                s.add(row, c.p_cap_w, ev.sigma.gemm_cap * c.p_cap_w)


def _add_idle_and_hbm(
    s: LinearSystem, c: Coefficients, sample: ParameterSample, ev: Evidence
) -> None:
    full, knee = ev.serving.freq_mhz * MS, 1.0

    def idle(clock: float) -> Floats:
        return energy_columns(lambda k: physics.idle_power_w(k, clock), c)

    idle_knee_w = sample["idle_full_w"] * sample["idle_knee_share"]
    s.add(idle(full), sample["idle_full_w"], ev.sigma.idle * sample["idle_full_w"])
    s.add(idle(knee), idle_knee_w, ev.sigma.idle * idle_knee_w)
    for p in ev.hbm_power.points:
        moved = p.hbm_use * ev.hbm_power.bandwidth_gb_per_s * 1e9  # bytes in one second
        stream = c._replace(weight_bytes=moved)
        row = energy_columns(
            lambda k: physics.iteration_energy_j(k, 0.0, 0.0, 0.0, 1.0, ev.hbm_power.freq_mhz * MS),
            stream,
        )
        s.add(row, p.power_w, ev.sigma.hbm_power * p.power_w)


def _add_shape(
    s: LinearSystem, c: Coefficients, server: ColocatedServer, sample: ParameterSample, ev: Evidence
) -> None:
    """Power of a small decode batch at a low clock as a fraction of that at the default clock."""

    def power(clock_ghz: float) -> Floats:
        cached = SHAPE_BATCH * server.context_tokens
        return energy_columns(
            lambda k: physics.power_w(k, SHAPE_BATCH, 0.0, cached, SHAPE_BATCH, clock_ghz), c
        )

    full_w = ev.serving.points[0].power_w
    row = power(SHAPE_CLOCK_GHZ) - sample["decode_power_share_780"] * power(
        ev.serving.freq_mhz * MS
    )
    s.add(row, 0.0, ev.sigma.shape * full_w)


def _solve(s: LinearSystem, ev: Evidence) -> dict[str, float]:
    scale = np.array([SCALE.get(n, 1.0) for n in ENERGY_NAMES])
    for i, name in enumerate(ENERGY_NAMES):
        prior = ev.energy[name]
        s.add(np.eye(len(ENERGY_NAMES))[i], prior.mean / scale[i], prior.sigma / scale[i])
    low = np.array([ev.energy[n].low for n in ENERGY_NAMES]) / scale
    high = np.array([ev.energy[n].high for n in ENERGY_NAMES]) / scale
    rows, targets = s.weighted()
    x = lsq_linear(rows, targets, bounds=(low, high), method="bvls", tol=1e-12).x * scale
    return dict(zip(ENERGY_NAMES, x.tolist(), strict=True))


def _fp8_flop(
    kernels: Kernels, sample: ParameterSample, ev: Evidence, values: dict[str, float]
) -> float:
    """Energy per fp8 operation that puts sustained fp8 GEMMs at the cap, the others given."""
    s = LinearSystem([], [], [])
    _add_gemm_cap(s, kernels, sample, ev, "fp8")
    if not s.rows:
        return values["e_flop_j"]
    i = ENERGY_NAMES.index("e_flop_j")
    others = np.array(
        [0.0 if n == "e_flop_j" else values[n] / SCALE.get(n, 1.0) for n in ENERGY_NAMES]
    )
    rows, targets = s.weighted()
    rest = targets - rows @ others
    return float(rows[:, i] @ rest / (rows[:, i] @ rows[:, i])) * SCALE["e_flop_j"]


def fit_energy(
    kernels: Kernels, sample: ParameterSample, ev: Evidence, freq_min_ghz: float
) -> EnergyFit:
    """Fit the energy coefficients in one sample.

    Args:
        kernels: latency coefficients per (phase, dtype, TP), host and energy left out.
        sample: one member of what no table settles.
        ev: the evidence.
        freq_min_ghz: lowest clock of the GPU, GHz.
    """
    key = (ev.serving.dtype, ev.serving.tp)
    c = with_sample(kernels[("decode", *key)], sample, "decode")
    c = c._replace(attn_prefill_s=kernels[("prefill", *key)].attn_prefill_s)
    server = infer_server(c, ev.serving, sample["decode_host_s"])
    c = server.apply(c)
    values: dict[str, float] = {}
    for round_ in range(CAP_ROUNDS):
        s = LinearSystem([], [], [])
        _add_serving(s, c._replace(**values), server, ev, freq_min_ghz, capped=round_ > 0)
        _add_gemm_cap(s, kernels, sample, ev, "bf16")
        _add_idle_and_hbm(s, c, sample, ev)
        _add_shape(s, c, server, sample, ev)
        values = _solve(s, ev)
    return EnergyFit(values, _fp8_flop(kernels, sample, ev, values), server)
