"""``biscale place``: tier 1 for one workload, DistServe's and BiScale's placements side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biscale_env.cli.comparison_options import RayAddress
from biscale_env.cli.instance_options import describes_instance
from biscale_env.cli.trace_options import reads_trace
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole

if TYPE_CHECKING:
    from biscale_env.envs.cluster.cluster_settings import ClusterSettings
    from biscale_env.jobs.workers import Workers
    from biscale_env.traces import Trace
    from biscale_env.traces.reading.reading_options import ReadingOptions
    from controllers.placement.ilp import CapacityTable, Plan

# a generated workload only gives the shape: loads are made by choosing and superposing its requests
MOST_SHAPE_RPS = 100.0
DEFAULT_PROFILE = "gamma-sharegpt-like"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("place")(place)


@reads_trace
@describes_instance("slo", "gpu", "llm", "model", "ep", "dtype", "idle", "prefix_cache")
def place(
    *,
    rate: Annotated[float, typer.Option(help="Load to serve, requests/s.")],
    gpus: Annotated[int, typer.Option(help="GPUs of the cluster.")] = 16,
    trace: Annotated[
        str | None,
        typer.Option(
            help="Trace file or name; default: the generated workload gamma-sharegpt-like."
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Headroom of BiScale's placement over the load.")
    ] = 0.1,
    window: Annotated[
        float, typer.Option(help="Length of the workload's window, s; the first of the trace.")
    ] = 300.0,
    table: Annotated[bool, typer.Option("--table", help="Print the capacity table too.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write BiScale's placement as YAML.")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes for the capacity table; default: all cores.")
    ] = None,
    ray: RayAddress = None,
    instance: dict[str, Any],
    reading: "ReadingOptions",
) -> None:
    """Choose instances, TP and base clocks for a load.

    BiScale's ILP beside DistServe's max goodput, with predicted power.
    """
    from controllers.placement.ilp import biscale_plan, check_request, distserve_plan

    check_request(rate, gpus, alpha)
    from biscale_env.jobs.workers import Workers

    workers = Workers.of(jobs, ray)
    from biscale_env.config import load_slo
    from biscale_env.envs.cluster.cluster_settings import ClusterSettings
    from biscale_env.envs.loads.prefix_hits import with_cache

    own = {"tp", "max_seqs"}  # chosen by the placement, and given per phase
    settings = ClusterSettings.of(gpus=gpus, **{k: v for k, v in instance.items() if k not in own})
    load_slo(settings.slo)
    workload = with_cache(settings.prefix_cache, _workload(trace, rate, window, reading))
    capacities = _table(settings, workload, workers)
    if table:
        _print_table(capacities)
    plans = [distserve_plan(capacities, rate, gpus), biscale_plan(capacities, rate, gpus, alpha)]
    _print_plans(plans, settings, workload.scaled_to(rate, 0), rate)
    if out is not None:
        _write(plans[1], out)


def _workload(
    trace: str | None, rate: float, window_s: float, reading: "ReadingOptions"
) -> "Trace":
    """First window of the trace, or a generated one.

    The capacity search makes other loads of it.
    """
    import numpy as np

    from biscale_env.traces import generate, load_named
    from controllers.placement.capacity_table import MIN_REQUESTS

    if not window_s > 0:
        raise BiscaleError(f"--window must be a positive time in seconds, got {window_s:g}")
    if trace is None:
        shape_rps = float(np.clip(rate, 2 * MIN_REQUESTS / window_s, MOST_SHAPE_RPS))
        return generate(DEFAULT_PROFILE, rate_rps=shape_rps, duration_s=window_s, seed=0)
    loaded = load_named(trace, reading)
    if loaded.duration_s < window_s:
        raise BiscaleError(
            f"{loaded.name} lasts {loaded.duration_s:g} s, less than the window of {window_s:g} s: "
            f"use a longer trace or --window {loaded.duration_s:.0f}"
        )
    piece = loaded.window(0.0, window_s)
    if len(piece) == 0:
        raise BiscaleError(
            f"{loaded.name} has no requests in its first {window_s:g} s: use another trace or "
            "--window"
        )
    return piece


def _table(settings: "ClusterSettings", workload: "Trace", workers: "Workers") -> "CapacityTable":
    from biscale_env.jobs.progress import JobProgress
    from controllers.placement.capacity_table import TableRequest, capacity_table

    with JobProgress("entries of the capacity table", transient=True) as progress:
        return capacity_table(TableRequest(settings), workload, workers, progress.tell)


def _print_table(capacities: "CapacityTable") -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"R_c and E_c on {capacities.workload}, SLO {capacities.slo}")
    for head in ("phase", "TP", "clock, MHz", "R_c, req/s", "E_c, J/req", "power at R_c, W"):
        shown.add_column(head, justify="left" if head == "phase" else "right")
    for e in capacities.entries:
        cells = (
            e.phase,
            str(e.tp),
            f"{e.freq_mhz:g}",
            f"{e.rate_rps:.2f}",
            f"{e.energy_j:.1f}",
            f"{e.power_w:.0f}",
        )
        shown.add_row(*cells)
    Console().print(shown)


def _print_plans(
    plans: "list[Plan]", settings: "ClusterSettings", workload: "Trace", rate: float
) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(
        title=f"{rate:g} requests/s on {settings.gpus} GPUs, SLO {settings.slo}, {settings.dtype}"
    )
    shown.add_column("")
    for plan in plans:
        shown.add_column(plan.placement.name)
    rows = [_rows_of(plan, settings, workload) for plan in plans]
    for name in rows[0]:
        shown.add_row(name, *(row[name] for row in rows))
    console = Console()
    console.print(shown)
    console.print(
        "power and latency: simulated on the workload at this rate; spare GPUs idle without a "
        "context"
    )


def _rows_of(plan: "Plan", settings: "ClusterSettings", workload: "Trace") -> dict[str, str]:
    from biscale_env.envs.cluster.cluster_settings import ClusterPlant
    from biscale_env.envs.cluster.whole_run import run_cluster

    run = run_cluster(ClusterPlant(settings), plan.placement, workload)
    row, energy, capacity = run.row(), run.energy, plan.capacity_rps
    parts = {"prefill": energy.prefill_j, "decode": energy.decode_j, "spare": energy.spare_j}
    power = [f"{joules / run.duration_s:.0f} {part}" for part, joules in parts.items()]
    label = plan.placement.label().split("; ")
    return {
        "prefill": label[0].removeprefix("P "),
        "decode": label[1].removeprefix("D "),
        "GPUs": f"{plan.placement.gpus} of {settings.gpus}",
        "capacity, req/s": f"{capacity['prefill']:.1f} prefill, {capacity['decode']:.1f} decode",
        "headroom": f"{100 * plan.headroom:+.0f} %",
        "power at capacity, W": f"{plan.power_w:.0f}",
        "power at this rate, W": ", ".join(power),
        "total, W": f"{row['mean_power_w']:.0f}",
        "J per output token": f"{row['total_j_per_token']:.3f}",
        "P99 TTFT, TPOT": f"{1e3 * row['ttft_p99_s']:.0f} ms, {1e3 * row['tpot_p99_s']:.0f} ms",
        "SLO": "met" if run.meets_slo else "missed",
    }


def _write(plan: "Plan", out: Path) -> None:
    import yaml

    content = plan.placement.model_dump(mode="json")
    try:
        write_whole(out, yaml.safe_dump(content, sort_keys=False))
    except OSError as error:
        raise BiscaleError(f"cannot write {out}: {error.strerror}") from None
    typer.echo(f"written: {out}")
