"""``biscale traces generate``: workloads from profiles and options, written to a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from biscale_env.core.errors import BiscaleError

if TYPE_CHECKING:
    from biscale_env.traces import Arrivals, LengthProfile

ArrivalKind = Literal["poisson", "gamma", "mmpp", "diurnal"]
USED_BY = {
    "cv": {"gamma", "mmpp", "diurnal"},
    "high_factor": {"mmpp"},
    "high_s": {"mmpp"},
    "low_s": {"mmpp"},
    "envelope": {"diurnal"},
    "start_hour": {"diurnal"},
}


def _arrivals(kind: ArrivalKind, given: dict[str, Any]) -> "Arrivals":
    """Arrival process of the given kind; options that it does not have are refused."""
    from biscale_env.config.loader import validate
    from biscale_env.traces import Arrivals

    for option, value in given.items():
        if value is not None and kind not in USED_BY[option]:
            raise BiscaleError(f"--{option.replace('_', '-')} does not apply to --arrivals {kind}")
    data: dict[str, Any] = {"gap_cv": given["cv"] or (2.0 if kind == "gamma" else 1.0)}
    if kind == "mmpp":
        data["modulation"] = {
            "high_factor": given["high_factor"] or 3.0,
            "mean_high_s": given["high_s"] or 10.0,
            "mean_low_s": given["low_s"] or 30.0,
        }
    if kind == "diurnal":
        data["envelope"] = given["envelope"] or "azure-conv-week"
        data["start_s"] = 3600 * (given["start_hour"] or 0.0)
    return validate(data, Arrivals, f"--arrivals {kind}")


def _lengths(
    name: str | None, prompt_tokens: int | None, output_tokens: int | None
) -> "LengthProfile | None":
    from biscale_env.config.loader import validate
    from biscale_env.traces import LengthProfile, load_lengths

    if prompt_tokens is None and output_tokens is None:
        return load_lengths(name) if name else None
    if prompt_tokens is None or output_tokens is None or name:
        raise BiscaleError(
            "fixed lengths need both --prompt-tokens and --output-tokens, and no --lengths"
        )
    data: dict[str, Any] = {"name": "fixed", "source": "command line"}
    for field, tokens in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        data[field] = {"kind": "quantiles", "levels": [0, 1], "tokens": [tokens, tokens]}
    return validate(data, LengthProfile, "fixed lengths")


def generate_command(
    out: Annotated[
        Path, typer.Argument(help="File to write: .csv, .jsonl (Mooncake) or .parquet.")
    ],
    *,
    workload: Annotated[
        str, typer.Option(help="Workload profile: name or YAML file.")
    ] = "azure-conv-like",
    arrivals: Annotated[
        ArrivalKind | None, typer.Option(help="Arrivals in place of the profile's.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Length profile in place of the workload's.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Mean rate, requests/s.")] = None,
    duration: Annotated[float | None, typer.Option(help="Duration, s.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed.")] = None,
    cv: Annotated[float | None, typer.Option(help="CV of the gaps (gamma: 2).")] = None,
    high_factor: Annotated[
        float | None, typer.Option(help="mmpp: high rate / mean rate (3).")
    ] = None,
    high_s: Annotated[
        float | None, typer.Option(help="mmpp: mean stay in the high state, s (10).")
    ] = None,
    low_s: Annotated[
        float | None, typer.Option(help="mmpp: mean stay in the low state, s (30).")
    ] = None,
    envelope: Annotated[
        str | None, typer.Option(help="diurnal: rate profile (azure-conv-week).")
    ] = None,
    start_hour: Annotated[
        float | None, typer.Option(help="diurnal: hour of the rate profile to start at.")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Fixed prompt length.")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="Fixed output length.")] = None,
) -> None:
    """Generate a workload and write it to a file."""
    from biscale_env.traces import generate, load_workload, write_trace

    profile = load_workload(workload)
    options = {
        "cv": cv,
        "high_factor": high_factor,
        "high_s": high_s,
        "low_s": low_s,
        "envelope": envelope,
        "start_hour": start_hour,
    }
    if arrivals is not None:
        name = f"{arrivals}-{lengths or profile.lengths}"
        profile = profile.model_copy(
            update={"name": name, "arrivals": _arrivals(arrivals, options)}
        )
    elif any(value is not None for value in options.values()):
        raise BiscaleError(
            "--cv, --high-factor, --high-s, --low-s, --envelope and --start-hour need --arrivals"
        )
    trace = generate(profile, rate, duration, seed, _lengths(lengths, prompt_tokens, output_tokens))
    if not len(trace):
        raise BiscaleError("this workload has no request: raise --rate or --duration")
    write_trace(trace, out)
    typer.echo(
        f"{out}: {len(trace)} requests in {trace.duration_s:g} s, {trace.rate_rps:.4g} requests/s"
    )
