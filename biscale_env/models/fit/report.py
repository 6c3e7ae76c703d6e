"""Model against measurement: per GPU and LLM, what was measured and what the formula says.

Every figure is computed from the committed files; errors on what a fit was not shown are those of
`biscale fit --held-out`.
"""

from collections.abc import Iterator
from typing import Final

import numpy as np
import pandas as pd

from biscale_env.config import configs_dir, load_gpu, load_llm
from biscale_env.core.markdown import markdown_table
from biscale_env.models import physics
from biscale_env.models.coefficient_files import files_in, known_names, read_model_file
from biscale_env.models.fit.gpu_evidence import GpuEvidence, known_evidence, load_gpu_evidence
from biscale_env.models.fit.gpu_files import servers_of
from biscale_env.models.fit.gpu_fit import HostTime, ServerWork, predict_kernels, predict_points
from biscale_env.models.fit.held_out import read_held_out
from biscale_env.models.gemm import predict_gemm
from biscale_env.models.gpu_layer import load_layer
from biscale_env.models.iteration_model import IterationModel, load_model
from biscale_env.models.physics import Coefficients

ITL_TARGET: Final = {"dense": 0.08, "experts": 0.15}  # up to batch 64, LLMs left out
POWER_TARGET: Final = {"dense": 0.08, "experts": 0.15}
KERNEL_TARGET: Final = 0.06
COVERAGE: Final = 0.85  # of points inside a 5-95 % band
TOKENS: Final = 2048.0  # of the prefill batch whose clock axis is shown
BATCHES: Final = (8.0, 32.0, 128.0)
CONTEXT: Final = 1000.0


def frame_markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table; numbers to the right."""
    sides = ("r" if pd.api.types.is_numeric_dtype(frame[c]) else "l" for c in frame)
    heads = [str(name) for name in frame.columns]
    return markdown_table(heads, frame.itertuples(index=False), "".join(sides))


def percent(value: float, signed: bool = False) -> str:
    """A share as text, e.g. ``3.1 %``."""
    return f"{100 * value:+.1f} %" if signed else f"{100 * value:.1f} %"


def kernel_frame(gpu: str) -> pd.DataFrame:
    """Measured GEMMs against the layer: duration, power, energy per operation."""
    ev, layer = load_gpu_evidence(gpu), load_layer(gpu).values
    points = ev.kernels.points
    time, power = predict_kernels(points, load_gpu(gpu), layer)
    time_error = 1e6 * time / [p.time_us for p in points] - 1.0
    power_error = power / [p.power_w for p in points] - 1.0
    return pd.DataFrame(
        {
            "rows x k x n": [f"{p.rows:.0f} x {p.k:.0f} x {p.n:.0f}" for p in points],
            "clock, MHz": [int(p.freq_mhz) for p in points],
            "time, µs": [f"{p.time_us:.0f}" for p in points],
            "model": [f"{1e6 * t:.0f}" for t in time],
            "error": [percent(float(e), True) for e in time_error],
            "power, W": [f"{p.power_w:.0f}" for p in points],
            "model ": [f"{w:.0f}" for w in power],
            "error ": [percent(float(e), True) for e in power_error],
        }
    )


def measured_servers(gpu: str) -> Iterator[tuple[ServerWork, list[float], list[float]]]:
    """Measured servers with what the shipped models say: median intervals in s, power in W."""
    ev, layer = load_gpu_evidence(gpu), load_layer(gpu).values
    for server in servers_of(ev, layer, ev.serving.groups)[0]:
        g = server.group
        c = load_model("decode", g.tp, g.dtype, f"{gpu}/{g.llm}", ep=g.ep).coefficients
        host = HostTime(c.host0_s, c.host_s_per_seq)
        found = predict_points(ev, load_gpu(gpu), layer, server, host, c.energy_factor)
        yield server, [q.itl_p50_s for q in found], [q.power_w for q in found]


def server_frame(gpu: str) -> pd.DataFrame:
    """Per measured server: errors of the shipped model, and with its LLM left out of the fit."""
    record = read_held_out(gpu) or {}
    left_out = {row["server"]: row for row in record.get("servers", [])}
    rows = []
    for server, itl, power in measured_servers(gpu):
        p = server.group.points
        itl_error = np.array(itl) / [x.itl_p50_s for x in p] - 1.0
        power_error = np.array(power) / [x.power_w for x in p] - 1.0
        out = left_out.get(server.group.label)
        rows.append(
            {
                "server": server.group.label,
                "batches": f"{p[0].batch:.0f} to {p[-1].batch:.0f}",
                "ITL error": percent(float(np.abs(itl_error).mean())),
                "power error": percent(float(np.abs(power_error).mean())),
                "ITL, LLM left out": percent(out["itl_mape"]) if out else "",
                "power, LLM left out": percent(out["power_mape"]) if out else "",
                "ITL in band": f"{out['itl_inside_5_95']} of {out['points']}" if out else "",
                "power in band": f"{out['power_inside_5_95']} of {out['points']}" if out else "",
            }
        )
    return pd.DataFrame(rows)


def family_frame() -> pd.DataFrame:
    """Shipped families: configurations and held-out errors of their kernel tables."""
    rows = []
    for name in known_names():
        found = [read_model_file(path) for path in files_in(configs_dir() / "models" / name)]
        errors = [float(c.fit["held_out_mape"]) for c in found]
        shares = [float(c.fit["estimated_share"]) for c in found]
        kinds = sorted({f"{c.dtype} TP{c.tp}" + (f" EP{c.ep}" if c.ep > 1 else "") for c in found})
        measured = any(c.coefficients["energy_factor"].provenance == "derived" for c in found)
        rows.append(
            {
                "model": name,
                "configurations": ", ".join(kinds),
                "kernel sums, held-out error": f"{percent(min(errors))} to {percent(max(errors))}",
                "estimated kernels": percent(float(np.mean(shares))),
                "servers measured": "yes" if measured else "no",
            }
        )
    return pd.DataFrame(rows)


def clock_frame(model: IterationModel, work: tuple[float, float, float, float]) -> pd.DataFrame:
    """Latency, power and energy of one iteration over the control levels, with the members' band.

    Args:
        model: the model.
        work: tokens, attention token-pairs, cached tokens, requests.
    """
    levels = [float(f) for f in model.gpu.control_levels_mhz]
    top = levels[-1]
    energy = [
        [float(model.energy_j(*work, f, k)) for f in levels] for k in (-1, *range(model.n_members))
    ]
    ratio = np.array(energy) / np.array(energy)[:, -1:]
    low, high = np.percentile(ratio[1:], (5, 95), axis=0)
    best = float(model.optimal_freq_mhz(*work))
    nearest = min(levels, key=lambda f: abs(f - best))
    time = [float(model.latency_s(*work, f)) for f in levels]
    return pd.DataFrame(
        {
            "clock, MHz": [f"{f:.0f}" for f in levels],
            "time": [f"x {t / time[-1]:.2f}" for t in time],
            "power, W": [f"{float(model.power_w(*work, f)):.0f}" for f in levels],
            "energy against " + f"{top:.0f} MHz": [f"{r:.3f}" for r in ratio[0]],
            "members, 5 to 95 %": [f"{a:.3f} to {b:.3f}" for a, b in zip(low, high, strict=True)],
            "": ["least energy" if f == nearest else "" for f in levels],
        }
    )


def summary_frame() -> pd.DataFrame:
    """The targets, on what the fit was not shown, met or missed."""
    rows: list[tuple[str, str, str, bool]] = []
    record = read_held_out("h100-sxm") or {}
    kinds = {
        g.label: "experts" if load_llm(g.llm).experts else "dense"
        for g in load_gpu_evidence("h100-sxm").serving.groups
    }
    clocks = record.get("clocks", [])
    if clocks:
        n = np.array([c["kernels"] for c in clocks])
        mape = float(np.array([c["power_mape"] for c in clocks]) @ n / n.sum())
        rows.append(
            ("H100 kernel power, clock left out", percent(mape), "<= 6 %", mape <= KERNEL_TARGET)
        )
    slow, capped = (
        predict_gemm("h100-sxm", 4096, 8192, 8192, freq_mhz=f) for f in (1005.0, 1980.0)
    )
    saving = slow.energy_per_tflop_j / capped.energy_per_tflop_j - 1.0
    rows.append(
        (
            "H100 GEMM, energy per operation at 1005 MHz against the cap",
            percent(saving, True),
            "-19 to -25 % (measured)",
            -0.25 <= saving <= -0.19,
        )
    )
    for what, target in (("itl", ITL_TARGET), ("power", POWER_TARGET)):
        for kind in ("dense", "experts"):
            servers = [r for r in record.get("servers", []) if kinds[r["server"]] == kind]
            if servers:
                n = np.array([r["points"] for r in servers])
                mape = float(np.array([r[f"{what}_mape"] for r in servers]) @ n / n.sum())
                rows.append(
                    (
                        f"H100 {what.replace('itl', 'ITL')}, LLM left out, {kind}",
                        percent(mape),
                        f"<= {100 * target[kind]:.0f} %",
                        mape <= target[kind],
                    )
                )
        if f"{what}_coverage" in record:
            share = float(record[f"{what}_coverage"])
            rows.append(
                (
                    f"H100 {what.replace('itl', 'ITL')}, points inside the members' 5-95 % band",
                    percent(share),
                    f"nominal 90 %, held to >= {100 * COVERAGE:.0f} %",
                    share >= COVERAGE,
                )
            )
    frame = pd.DataFrame(rows, columns=["on what the fit was not shown", "model", "target", "met"])
    frame["met"] = np.where(frame["met"], "met", "MISSED")
    return frame


def borrowed(ev: GpuEvidence) -> str:
    """What of a GPU's layer is not its own, in a sentence."""
    names = sorted(n for n, p in ev.prior.items() if p.source.startswith("borrowed"))
    if not names:
        return "Nothing is borrowed from another GPU."
    own = []
    if ev.kernels.points:
        own.append(f"{len(ev.kernels.points)} GEMMs")
    if ev.serving.groups:
        own.append(f"{len(ev.serving.groups)} servers")
    start = f"fitted to {' and '.join(own)} of its own" if own else "nothing of its own is measured"
    return f"{start}; priors borrowed from {ev.base}: {', '.join(names)}."


def report_markdown() -> str:
    """The whole page."""
    parts = ["## In short\n", frame_markdown(summary_frame()), "", "## Shipped models\n"]
    parts += [frame_markdown(family_frame()), ""]
    for gpu in known_evidence():
        ev = load_gpu_evidence(gpu)
        parts += [f"## {gpu}\n", f"{borrowed(ev)[0].upper()}{borrowed(ev)[1:]}\n"]
        if ev.kernels.points:
            parts += [
                f"Measured GEMMs ({ev.kernels.source}):\n",
                frame_markdown(kernel_frame(gpu)),
                "",
            ]
        if ev.serving.groups:
            parts += [
                f"Measured servers ({ev.serving.source}):\n",
                frame_markdown(server_frame(gpu)),
                "",
            ]
            if ev.serving.left_out:
                parts += [f"Left out: {ev.serving.left_out}.\n"]
    parts += ["## The clock axis of Llama 3.3 70B on H100\n"]
    prefill, decode = load_model("prefill"), load_model("decode")
    parts += [f"Prefill, one batch of {TOKENS:.0f} tokens, TP 4, bf16:\n"]
    parts += [frame_markdown(clock_frame(prefill, (TOKENS, TOKENS**2 / 2, 0.0, 1.0))), ""]
    for b in BATCHES:
        parts += [f"Decode, batch {b:.0f} with {CONTEXT:.0f} tokens of context each:\n"]
        parts += [frame_markdown(clock_frame(decode, (b, 0.0, b * CONTEXT, b))), ""]
    parts += [_idle(decode.coefficients), ""]
    return "\n".join(parts)


def _idle(c: Coefficients) -> str:
    high, low = (float(physics.idle_power_w(c, f)) for f in (1.98, 1.0))
    return (
        f"Idle with a context: {high:.0f} W at 1980 MHz (95 to 141 W were seen), {low:.0f} W at "
        f"1000 MHz."
    )
