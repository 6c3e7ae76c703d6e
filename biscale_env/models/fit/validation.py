"""Model against measurement.

Every comparison that the evidence allows, met or missed, as one table.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.models import physics
from biscale_env.models.ensemble import (
    Curve,
    Member,
    curve,
    fit_member,
    gemm_clocks_ghz,
    serving_errors,
)
from biscale_env.models.fit.evidence import Evidence, load_evidence, profile_path
from biscale_env.models.fit.latency import predict_s
from biscale_env.models.fit.power import gemm_only
from biscale_env.models.fit.profile_table import ProfileTable, read_profile
from biscale_env.models.fit.serving_evidence import MS
from biscale_env.models.fit.shipped import fit_kernels, tables
from biscale_env.models.iteration_model import IterationModel, load_model
from biscale_env.models.physics import Coefficients

LATENCY_TARGET = 0.05  # mean absolute error on held-out points
SERVING_TARGET = 0.10  # each measured serving point
CAP_TARGET = 0.03  # sustained GEMM power
HALF_CAP_W = 350.0
IDLE_BAND_W = (95.0, 141.0)
COLUMNS = ("evidence", "configuration", "quantity", "measured", "model", "error", "target", "met")


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        evidence: what kind of evidence it is.
        configuration: phase, dtype, TP.
        quantity: what is compared, with its unit.
        measured: the measured value, or a band.
        model: what the model says.
        error: relative error, None where a band is given.
        target: the target in words; empty where there is none and the line is only reported.
        met: whether the target is met; None without one.
    """

    evidence: str
    configuration: str
    quantity: str
    measured: str
    model: str
    error: float | None = None
    target: str = ""
    met: bool | None = None


def _kernels_only(c: Coefficients) -> Coefficients:
    return c._replace(host0_s=0.0, host_s_per_seq=0.0)


def _errors(model: IterationModel, table: ProfileTable) -> NDArray[np.float64]:
    c = _kernels_only(model.coefficients)
    return np.abs(predict_s(c, table, c.freq_profile_ghz) / table.column("latency_s") - 1.0)


def latency_checks(ev: Evidence) -> Iterator[Check]:
    """Held-out kernel sums, recomputed from the committed coefficients.

    Also the points beyond the box.
    """
    everything = {(t.phase, t.dtype, t.tp): t for t in read_profile(profile_path(ev))}
    for table in tables(ev):
        model = load_model(table.phase, table.tp, table.dtype, ev.name)
        name = f"{table.phase} {table.dtype} TP{table.tp}"
        held = _errors(model, table)[table.held_out()]
        yield Check(
            "held-out kernel sums",
            name,
            f"latency, {held.size} points",
            "kernel table",
            f"MAPE {held.mean():.1%}, max {held.max():.0%}",
            float(held.mean()),
            f"MAPE <= {LATENCY_TARGET:.0%}",
            bool(held.mean() <= LATENCY_TARGET),
        )
        whole = everything[(table.phase, table.dtype, table.tp)]
        beyond = ~np.isin(whole.work.tokens, table.work.tokens)
        if beyond.any():
            far = _errors(model, whole)[beyond]
            text = f"MAPE {far.mean():.1%}, max {far.max():.0%}"
            yield Check(
                "beyond the box",
                name,
                f"latency, {far.size} points",
                "kernel table",
                text,
                float(far.mean()),
            )


def serving_checks(ev: Evidence, member: Member, freq_min_ghz: float) -> Iterator[Check]:
    """Median and mean token interval and power of the measured server."""
    s = ev.serving
    c = load_model("decode", s.tp, s.dtype, ev.name).coefficients
    errors = serving_errors(c, member.energy, ev, freq_min_ghz)
    for point, row in zip(s.points, errors, strict=True):
        figures = (
            ("median interval, ms", point.itl_p50_s * 1e3, row[0], True),
            ("mean interval, ms", point.interval_s * 1e3, row[1], False),
            ("power per GPU, W", point.power_w, row[2], True),
        )
        for quantity, measured, error, judged in figures:
            target = f"within {SERVING_TARGET:.0%}" if judged and point.fitted else ""
            yield Check(
                "serving, fitted" if point.fitted else "serving, beyond the fit",
                f"decode {s.dtype} TP{s.tp} batch {point.batch:.0f}",
                quantity,
                f"{measured:.1f}",
                f"{measured * (1 + error):.1f}",
                float(error),
                target,
                bool(abs(error) <= SERVING_TARGET) if target else None,
            )


def gemm_checks(ev: Evidence) -> Iterator[Check]:
    """Sustained GEMM work: power, effective clock, and the rate that follows."""
    low, high = ev.gemm_cap.clock_range_ghz
    for config in ev.configurations:
        model = load_model("prefill", config.tp, config.dtype, ev.name)
        name, rows = (
            f"prefill {config.dtype} TP{config.tp}, GEMMs only",
            np.array(ev.gemm_cap.rows, dtype=np.float64),
        )
        c = gemm_only(model.coefficients)
        f = gemm_clocks_ghz(
            model.coefficients,
            ev.gemm_cap.rows,
            model.gpu.freq_max_mhz * MS,
            model.gpu.freq_min_mhz * MS,
        )
        power = physics.power_w(c, rows, 0.0, 0.0, 1.0, f)
        rate = c.flops_per_token * rows / physics.latency_s(c, rows, 0.0, 0.0, 1.0, f) / 1e12
        worst = float(np.abs(power / c.p_cap_w - 1.0).max())
        yield Check(
            "sustained GEMMs",
            name,
            "power per GPU, W",
            f"{c.p_cap_w:.0f}",
            f"{power.min():.0f} to {power.max():.0f}",
            worst,
            f"within {CAP_TARGET:.0%}",
            worst <= CAP_TARGET,
        )
        yield Check(
            "sustained GEMMs",
            name,
            "effective clock, GHz",
            "1.35 to 1.45 (derived)",
            f"{f.min():.2f} to {f.max():.2f}",
            None,
            f"{low:.2f} to {high:.2f}",
            bool(f.min() >= low and f.max() <= high),
        )
        measured = "675 to 695" if config.dtype == "bf16" else "not measured"
        yield Check(
            "sustained GEMMs",
            name,
            "rate, TFLOP/s per GPU",
            measured,
            f"{rate.min():.0f} to {rate.max():.0f}",
        )


def _prefill_curve(model: IterationModel, tokens: float, c: Coefficients | None = None) -> Curve:
    return curve(
        c or model.coefficients, (tokens, tokens * tokens / 2, 0.0, 1.0), model.gpu.clocks_mhz
    )


def _decode_curve(
    model: IterationModel, batch: float, context: float, c: Coefficients | None = None
) -> Curve:
    return curve(
        c or model.coefficients, (batch, 0.0, batch * context, batch), model.gpu.clocks_mhz
    )


def whole_iteration_checks(ev: Evidence) -> Iterator[Check]:
    """Measured prefill against the kernel sum, and the clock that the cap leaves an iteration."""
    for tp in (4, 8):
        model = load_model("prefill", tp, "bf16", ev.name)
        kernels = _kernels_only(model.coefficients)
        for n in (1024.0, 2048.0, 8192.0):
            work = (n, n * n / 2, 0.0, 1.0)
            base = float(physics.latency_s(kernels, *work, kernels.freq_profile_ghz))
            ratio = float(model.latency_s(*work, model.gpu.freq_max_mhz)) / base
            clock = float(model.effective_freq_mhz(*work, model.gpu.freq_max_mhz))
            name = f"prefill bf16 TP{tp}, {n:.0f} tokens"
            yield Check(
                "whole iteration",
                name,
                "latency / kernel sum at 1980 MHz",
                "1.16 to 1.44",
                f"{ratio:.2f}",
            )
            yield Check(
                "whole iteration",
                name,
                "effective clock at 1980 MHz, MHz",
                "not measured",
                f"{clock:.0f}",
            )


def frequency_checks(ev: Evidence, member: Member) -> Iterator[Check]:
    """Shape over the clock: soft evidence from other GPUs and models."""
    context = member.energy.server.context_tokens
    decode = load_model("decode", 4, "bf16", ev.name)
    prefill = load_model("prefill", 4, "bf16", ev.name)
    yield from _idle_checks(decode)
    for batch in (8.0, 32.0, 128.0):
        yield from _decode_shape(f"decode bf16 TP4 batch {batch:.0f}", decode, batch, context)
    for tokens in (512.0, 2048.0, 8192.0):
        k = _prefill_curve(prefill, tokens)
        yield _saving(f"prefill bf16 TP4, {tokens:.0f} tokens", k, "1.2 to 1.6 GHz (DynamoLLM)")
    yield from _half_cap_checks(prefill, decode, context)


def _idle_checks(decode: IterationModel) -> Iterator[Check]:
    """Power of an instance that waits, at two clocks."""
    idle = [float(physics.idle_power_w(decode.coefficients, f)) for f in (1.005, 1.98)]
    low, high = IDLE_BAND_W
    what, band = "idle with context", f"{low:.0f} to {high:.0f}"
    inside = low <= idle[1] <= high
    model = f"{idle[1]:.0f}"
    yield Check(what, "any", "power at 1980 MHz, W", band, model, None, "in the band", inside)
    ratio = f"{idle[0] / idle[1]:.2f}"
    yield Check(what, "any", "power at 1005 MHz relative to 1980", "0.62 to 0.78 (NVL)", ratio)


def _decode_shape(
    name: str, model: IterationModel, batch: float, context: float
) -> Iterator[Check]:
    """Power, latency and saving of one decode iteration over the clock."""
    k = _decode_curve(model, batch, context)
    power, latency = k.ratio(k.power_w, 780.0), k.ratio(k.latency_s, 1200.0)
    asked = "power at 780 MHz relative to 1980"
    yield Check("shape", name, asked, "0.66 to 0.70 (H200)", f"{power:.2f}")
    asked = "latency at 1200 MHz relative to 1980"
    yield Check("shape", name, asked, "about 1.01 (H200, A100)", f"{latency:.2f}")
    yield _saving(name, k, "up to 32 % (H200), 39 % (A100)")


def _half_cap_checks(
    prefill: IterationModel, decode: IterationModel, context: float
) -> Iterator[Check]:
    """What half the power cap costs in time."""
    capped = [m.coefficients._replace(p_cap_w=HALF_CAP_W) for m in (prefill, decode)]
    p, p_half = (_prefill_curve(prefill, 2048.0, c).latency_s[-1] for c in (None, capped[0]))
    d, d_half = (_decode_curve(decode, 32.0, context, c).latency_s[-1] for c in (None, capped[1]))
    for name, evidence, ratio in (
        ("prefill bf16 TP4, 2048 tokens", "1.30 (POLCA)", p_half / p),
        ("decode bf16 TP4 batch 32", "1.00 (POLCA)", d_half / d),
    ):
        yield Check("half the power cap", name, "slow-down", evidence, f"{ratio:.2f}")


def _saving(name: str, k: Curve, evidence: str) -> Check:
    interior = k.freq_mhz[0] < k.best_mhz < k.freq_mhz[-1]
    text = f"{k.best_mhz:.0f} MHz, saves {k.saving_at_best:.0%}"
    return Check(
        "shape",
        name,
        "clock of least energy",
        evidence,
        text,
        None,
        "interior minimum",
        bool(interior),
    )


def hbm_checks(ev: Evidence) -> Iterator[Check]:
    """Memory-bound power of the H200 table.

    Weak evidence, so disagreement is reported, not judged.
    """
    c = load_model("decode", ev.serving.tp, ev.serving.dtype, ev.name).coefficients
    for p in ev.hbm_power.points:
        moved = p.hbm_use * ev.hbm_power.bandwidth_gb_per_s * 1e9
        stream = c._replace(weight_bytes=moved)
        watts = float(
            physics.iteration_energy_j(stream, 0.0, 0.0, 0.0, 1.0, ev.hbm_power.freq_mhz * MS)
        )
        error = watts / p.power_w - 1.0
        name = f"HBM use {p.hbm_use:.0%} of {ev.hbm_power.bandwidth_gb_per_s:.0f} GB/s"
        yield Check(
            "H200 GEMM power, p75",
            name,
            "power per GPU, W",
            f"{p.power_w:.0f}",
            f"{watts:.0f}",
            error,
        )


def validation_checks(name: str) -> list[Check]:
    """All comparisons for a shipped model family, from the committed coefficients."""
    ev = load_evidence(name)
    gpu = load_model("decode", ev.serving.tp, ev.serving.dtype, name).gpu
    kernels: dict[tuple[str, str, int], Coefficients] = {
        (t.phase, t.dtype, t.tp): fit_kernels(t, ev, gpu).coefficients for t in tables(ev)
    }
    nominal = fit_member(kernels, ev.nominal_sample, ev, gpu.freq_min_mhz * MS)
    return [
        *latency_checks(ev),
        *serving_checks(ev, nominal, gpu.freq_min_mhz * MS),
        *gemm_checks(ev),
        *whole_iteration_checks(ev),
        *frequency_checks(ev, nominal),
        *hbm_checks(ev),
    ]


def validation_frame(name: str) -> pd.DataFrame:
    """The model-against-measurement table.

    Returns:
        One row per comparison; columns ``COLUMNS``; ``error`` relative (NaN where a band is
        compared); ``met`` True, False, or None where there is no target.
    """
    return pd.DataFrame([asdict(c) for c in validation_checks(name)], columns=list(COLUMNS))


def to_markdown(frame: pd.DataFrame) -> str:
    """The table as GitHub markdown."""
    head = ["Evidence", "Configuration", "Quantity", "Measured", "Model", "Error", "Target"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in frame.to_dict("records"):
        error = "" if row["error"] is None or np.isnan(row["error"]) else f"{row['error']:+.1%}"
        verdict = {True: " (met)", False: " (MISSED)"}.get(row["met"], "")
        cells = [*(str(row[c]) for c in COLUMNS[:5]), error, f"{row['target']}{verdict}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
