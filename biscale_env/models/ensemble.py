"""The ensemble: random parameter samples, kept if they agree with all the evidence.

Each refits the energy coefficients.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.models import physics
from biscale_env.models.fit.evidence import Evidence, ParameterSample
from biscale_env.models.fit.power import EnergyFit, Kernels, fit_energy, gemm_only, with_sample
from biscale_env.models.fit.profile_table import IterationWork
from biscale_env.models.fit.serving_evidence import MS, capped_clock_ghz, median_s, mixture
from biscale_env.models.physics import Coefficients

Floats = NDArray[np.float64]
MAX_PROPOSALS_PER_MEMBER = 60
PREFILL_TOKENS = 2048.0  # work at which the prefill checks are made
DECODE_BATCHES = (8.0, 32.0)  # and the decode checks


@dataclass(frozen=True)
class Member:
    """One sample with everything fitted in it."""

    sample: ParameterSample
    energy: EnergyFit
    coefficients: dict[tuple[str, str, int], Coefficients]


def assemble(
    kernels: Kernels, sample: ParameterSample, energy: EnergyFit
) -> dict[tuple[str, str, int], Coefficients]:
    """Complete coefficients of every configuration in one sample.

    Both attention terms stand in both phases, so that an engine that mixes prefill and decode can
    use either.
    """
    out = {}
    for (phase, dtype, tp), c in kernels.items():
        full = energy.apply(with_sample(c, sample, phase, energy.server), dtype)
        out[(phase, dtype, tp)] = full._replace(
            attn_prefill_s=kernels[("prefill", dtype, tp)].attn_prefill_s,
            attn_decode_s=kernels[("decode", dtype, tp)].attn_decode_s,
        )
    return out


def serving_errors(c: Coefficients, energy: EnergyFit, ev: Evidence, freq_min_ghz: float) -> Floats:
    """Relative errors at the serving points, shape (points, 3).

    Median interval, mean interval, power per GPU.
    """
    errors = []
    for p in ev.serving.points:
        mix = mixture(p, energy.server.prompt_tokens, energy.server.context_tokens)
        w = mix.work
        f = capped_clock_ghz(c, w, ev.serving.freq_mhz * MS, freq_min_ghz)
        time = physics.latency_s(c, *w.as_tuple(), f)
        joule = physics.iteration_energy_j(c, w.tokens, w.attn_work, w.cached, time, f)
        mean = float(mix.share @ time)
        power = float(mix.share @ joule) / mean
        errors.append((median_s(c, mix, f) / p.itl_p50_s, mean / p.interval_s, power / p.power_w))
    return np.array(errors) - 1.0


def gemm_clocks_ghz(
    c: Coefficients, rows: tuple[int, ...], freq_max_ghz: float, freq_min_ghz: float
) -> Floats:
    """Effective clock of sustained GEMM work under the cap, GHz, per number of rows."""
    n = np.array(rows, dtype=np.float64)
    work = IterationWork(n, np.zeros_like(n), np.zeros_like(n), np.ones_like(n))
    return capped_clock_ghz(gemm_only(c), work, freq_max_ghz, freq_min_ghz)


@dataclass(frozen=True)
class Curve:
    """Latency, power and energy of one iteration over the clocks."""

    freq_mhz: Floats
    latency_s: Floats
    power_w: Floats

    @property
    def energy_j(self) -> Floats:
        """Energy per GPU, J."""
        return cast(Floats, self.latency_s * self.power_w)

    @property
    def best_mhz(self) -> float:
        """Clock of least energy, MHz."""
        return float(self.freq_mhz[np.argmin(self.energy_j)])

    @property
    def saving_at_best(self) -> float:
        """Energy saved at the best clock against the highest, relative."""
        return float(1.0 - self.energy_j.min() / self.energy_j[-1])

    def ratio(self, values: Floats, freq_mhz: float) -> float:
        """Value at a clock relative to that at the highest clock."""
        return float(np.interp(freq_mhz, self.freq_mhz, values) / values[-1])


def curve(c: Coefficients, work: tuple[float, float, float, float], clocks_mhz: Floats) -> Curve:
    """Latency and power over the clocks under the cap.

    Clocks above the effective one repeat its values.
    """
    arrays = [np.full(clocks_mhz.shape, axis) for axis in work]
    w = IterationWork(*arrays)
    top = capped_clock_ghz(
        c,
        IterationWork(*(a[-1:] for a in arrays)),
        float(clocks_mhz[-1]) * MS,
        float(clocks_mhz[0]) * MS,
    )
    f = np.minimum(clocks_mhz * MS, top)
    return Curve(
        clocks_mhz, physics.latency_s(c, *w.as_tuple(), f), physics.power_w(c, *w.as_tuple(), f)
    )


def disagreements(member: Member, ev: Evidence, clocks_mhz: Floats) -> list[str]:
    """Names of the evidence that a member contradicts; empty if it may be kept."""
    a, key = ev.accept, (ev.serving.dtype, ev.serving.tp)
    low_ghz, high_ghz = float(clocks_mhz[0]) * MS, float(clocks_mhz[-1]) * MS
    decode, prefill = member.coefficients[("decode", *key)], member.coefficients[("prefill", *key)]
    errors = serving_errors(decode, member.energy, ev, low_ghz)[
        [p.fitted for p in ev.serving.points]
    ]
    context = member.energy.server.context_tokens
    small, larger = (curve(decode, (b, 0.0, b * context, b), clocks_mhz) for b in DECODE_BATCHES)
    batch = curve(prefill, (PREFILL_TOKENS, PREFILL_TOKENS**2 / 2, 0.0, 1.0), clocks_mhz)
    clocks = np.concatenate(
        [
            gemm_clocks_ghz(c, ev.gemm_cap.rows, high_ghz, low_ghz)
            for k, c in member.coefficients.items()
            if k[:2] == ("prefill", "bf16")
        ]
    )

    def outside(value: float, band: tuple[float, float]) -> bool:
        return not band[0] <= value <= band[1]

    checks = {
        "serving": bool(np.abs(errors[:, [0, 2]]).max() > a.serving_error),
        "gemm_cap": outside(clocks.min(), ev.gemm_cap.clock_range_ghz)
        or outside(clocks.max(), ev.gemm_cap.clock_range_ghz),
        "idle": outside(float(physics.idle_power_w(decode, high_ghz)), a.idle_w),
        "power_share_780": outside(small.ratio(small.power_w, 780.0), a.power_share_780),
        "saving_at_best": any(outside(k.saving_at_best, a.saving_at_best) for k in (small, larger)),
        "slowdown_1200": larger.ratio(larger.latency_s, 1200.0) > 1.0 + a.slowdown_1200,
        "best_clock": any(outside(k.best_mhz, a.best_clock_mhz) for k in (batch, larger)),
    }
    return [name for name, bad in checks.items() if bad]


def fit_member(
    kernels: Kernels, sample: ParameterSample, ev: Evidence, freq_min_ghz: float
) -> Member:
    """Fit everything in one sample."""
    energy = fit_energy(kernels, sample, ev, freq_min_ghz)
    return Member(sample, energy, assemble(kernels, sample, energy))


def sample(
    kernels: Kernels, ev: Evidence, clocks_mhz: Floats
) -> tuple[list[Member], dict[str, int]]:
    """Member samples until ``ev.n_members`` agree with the evidence.

    Returns:
        The kept members, and how often each piece of evidence rejected a proposal (with
        ``proposals``, their number).

    Raises:
        BiscaleError: hardly any proposal agrees; the ranges and the evidence contradict each other.
    """
    rng = np.random.default_rng(ev.seed)
    kept: list[Member] = []
    counts: dict[str, int] = {"proposals": 0}
    while len(kept) < ev.n_members:
        if counts["proposals"] >= MAX_PROPOSALS_PER_MEMBER * ev.n_members:
            raise BiscaleError(
                f"evidence '{ev.name}': only {len(kept)} of {counts['proposals']} samples agree; "
                f"rejected by {counts}"
            )
        counts["proposals"] += 1
        member = fit_member(kernels, ev.random_sample(rng), ev, float(clocks_mhz[0]) * MS)
        reasons = disagreements(member, ev, clocks_mhz)
        for reason in reasons:
            counts[reason] = counts.get(reason, 0) + 1
        if not reasons:
            kept.append(member)
    return kept, counts
