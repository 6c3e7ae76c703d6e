"""``biscale traces``: list, fetch and describe request traces, make profiles, generate new ones."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from biscale_env.cli.trace_options import reads_trace
from biscale_env.cli.traces_generate_command import generate_command
from biscale_env.core.errors import BiscaleError

if TYPE_CHECKING:
    from biscale_env.config.loader import Config
    from biscale_env.traces import TraceStatistics
    from biscale_env.traces.reading.reading_options import ReadingOptions

group = typer.Typer(no_args_is_help=True, help="Request traces: list, fetch, describe, generate.")


def register(app: typer.Typer) -> None:
    """Add the ``traces`` group to the application."""
    group.command("generate")(generate_command)
    app.add_typer(group, name="traces")


@group.command("list")
def list_command() -> None:
    """Show every trace that has a name."""
    from rich.console import Console
    from rich.table import Table

    from biscale_env.traces import cache_dir, list_traces

    table = Table(title="Traces")
    for column in ("name", "kind", "ready", "requests"):
        table.add_column(column, no_wrap=True)
    table.add_column("source")
    for entry in list_traces():
        ready = "yes" if entry.ready else "fetch"
        table.add_row(entry.name, entry.kind, ready, f"{entry.requests:,}", entry.source)
    console = Console(markup=False)
    console.print(table)
    console.print(f"Public traces are cached in {cache_dir()}", soft_wrap=True, highlight=False)


@group.command("fetch")
def fetch_command(
    names: Annotated[
        list[str] | None, typer.Argument(help="Public traces; default the two of 2023.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Fetch from this address (a mirror) instead.")
    ] = None,
) -> None:
    """Download public traces (see `list`) into the cache.

    Streamed, continued where broken off, checked by SHA-256 where that is known.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from biscale_env.traces import fetch
    from biscale_env.traces.download import load_downloads

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    for name in names or ["azure-conv-2023", "azure-code-2023"]:
        with Progress(*columns, TimeRemainingColumn()) as bar:
            task = bar.add_task(name, total=None)
            path = fetch(
                name,
                base_url,
                lambda done, total: bar.update(task, completed=done, total=total),  # noqa: B023
            )
            size = path.stat().st_size
            bar.update(task, completed=size, total=size)
        unchecked = "" if load_downloads().files[name].sha256 else "; no digest to check is known"
        typer.echo(f"{name}: {path}{unchecked}")


def _statistics_table(s: "TraceStatistics") -> Any:
    from rich.table import Table

    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:,.5g}"

    table = Table("figure", "value", title=s.name)
    table.add_row("requests", f"{s.requests:,}")
    table.add_row("duration [s]", f"{s.duration_s:,.1f}")
    table.add_row("rate [requests/s]", figure(s.rate_rps))
    table.add_row("CV of inter-arrival times", figure(s.gap_cv))
    for window, value in s.dispersion.items():
        table.add_row(f"variance/mean of arrivals per {window}", figure(value))
    table.add_row("busiest second [requests]", f"{s.busiest_second_requests:,}")
    for what, tokens in (("prompt", s.prompt_tokens), ("output", s.output_tokens)):
        parts = (tokens.mean, tokens.p50, tokens.p90, tokens.p99, float(tokens.max))
        table.add_row(
            f"{what} tokens: mean, p50, p90, p99, max", ", ".join(f"{v:,.0f}" for v in parts)
        )
    table.add_row(
        "prompt, output work [tokens/s]",
        f"{s.prompt_tokens_per_s:,.0f}, {s.output_tokens_per_s:,.0f}",
    )
    table.add_row("rank correlation of the lengths", figure(s.rank_correlation))
    return table


def _to_yaml(profile: "Config") -> str:
    import yaml

    data = profile.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(
        data, sort_keys=False, default_flow_style=None, width=118, allow_unicode=True
    )


@group.command("convert")
@reads_trace
def convert_command(
    trace: Annotated[str, typer.Argument(help="Trace file, or name of a trace.")],
    out: Annotated[
        Path, typer.Argument(help="File to write: .parquet, .csv, or .jsonl (Mooncake).")
    ],
    *,
    reading: "ReadingOptions",
) -> None:
    """Write a trace of any known format in our own schema.

    Its columns: arrival_s, prompt_tokens, output_tokens.
    """
    from biscale_env.traces import load_named, write_trace

    if Path(trace).is_file() and out.exists() and out.samefile(trace):
        raise BiscaleError(f"{out} is the trace itself: choose another file to write")
    data = load_named(trace, reading)
    write_trace(data, out)
    typer.echo(
        f"{out}: {len(data)} requests in {data.duration_s:g} s, {data.rate_rps:.4g} requests/s"
    )


@group.command("describe")
@reads_trace
def describe_command(
    trace: Annotated[str, typer.Argument(help="Name of a trace (see `list`), or a file.")],
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Machine-readable, keys with units.")
    ] = False,
    as_profile: Annotated[
        Literal["lengths", "workload", "rates"] | None,
        typer.Option(help="Print a profile fitted to the trace, as YAML for `generate`."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the profile.")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Length profile that a workload profile names.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Citation to put into the profile.")] = None,
    reading: "ReadingOptions",
) -> None:
    """Show what a trace is like: rate, burstiness, lengths."""
    from rich.console import Console

    from biscale_env.traces import describe
    from biscale_env.traces.catalog import load_with_notes
    from biscale_env.traces.synthetic.envelopes import fit_envelope
    from biscale_env.traces.synthetic.profile_fit import fit_lengths, fit_workload

    loaded = load_with_notes(trace, reading)
    data = loaded.trace
    title, citation = name or data.name, source or f"fitted to {Path(trace).name}"
    if as_profile == "lengths":
        typer.echo(_to_yaml(fit_lengths(data, title, citation)), nl=False)
    elif as_profile == "workload":
        typer.echo(_to_yaml(fit_workload(data, title, lengths or title, citation)), nl=False)
    elif as_profile == "rates":
        typer.echo(_to_yaml(fit_envelope(data, title, citation)), nl=False)
    elif as_json:
        told = describe(data).as_dict()
        if loaded.recognised is not None:
            told["recognised"] = loaded.recognised.as_dict()
        typer.echo(json.dumps(told, indent=2))
    else:
        Console(markup=False).print(_statistics_table(describe(data)))


@group.command("envelope")
def envelope_command(
    file: Annotated[Path, typer.Argument(help="CSV with one request rate per line.")],
    *,
    rate_column: Annotated[str, typer.Option(help="Column of the request rate.")],
    time_column: Annotated[str, typer.Option(help="Column of the time, s.")] = "t_seconds",
    where: Annotated[str | None, typer.Option(help="Keep only lines with COLUMN=VALUE.")] = None,
    period_hours: Annotated[
        float, typer.Option(help="Fold the time with this period; later periods are averaged.")
    ] = 168,
    step_s: Annotated[float, typer.Option(help="Time between the factors, s.")] = 3600,
    name: Annotated[str | None, typer.Option(help="Name of the profile.")] = None,
    start: Annotated[str, typer.Option(help="Moment of the first factor, for the reader.")] = "",
    source: Annotated[str | None, typer.Option(help="Citation to put into the profile.")] = None,
) -> None:
    """Print a rate profile (for diurnal workloads) made from a table of request rates, as YAML."""
    from biscale_env.traces.synthetic.envelopes import fold_rates, read_rates

    time_s, rate_rps = read_rates(file, time_column, rate_column, where)
    profile = fold_rates(
        time_s,
        rate_rps,
        period_hours * 3600,
        step_s,
        name or file.stem,
        source or f"from {file.name}",
        start,
    )
    typer.echo(_to_yaml(profile), nl=False)
