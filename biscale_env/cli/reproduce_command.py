"""``biscale reproduce``: the published headline experiment, and a whole day of a cluster, from one
command each.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biscale_env.cli.instance_options import GpuName, LlmName, ModelName
from biscale_env.core.errors import BiscaleError
from biscale_env.reproduce.day_defaults import DAY_ALPHA, DAY_MARGIN, DAY_RPS

if TYPE_CHECKING:
    import pandas as pd

    from biscale_env.reproduce.day import Day
    from biscale_env.reproduce.paper import PaperExperiment
    from biscale_env.reproduce.paper_jobs import Task
    from biscale_env.traces import Trace

commands = typer.Typer(help="Reproduce published experiments.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(commands, name="reproduce")


@commands.command("paper")
def paper(
    quick: Annotated[
        bool, typer.Option("--quick", help="One rate, one load, few seeds: under two minutes.")
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(help="Experiment (configs/reproductions) or a YAML file. [default: paper]"),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(help="Trace file or name behind workload B. [default: the experiment's]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for paper.md, figures and rows. [default: runs/paper]"),
    ] = None,
    members: Annotated[
        int | None, typer.Option(help="Members of the model ensemble. [default: the experiment's]")
    ] = None,
    gpu: GpuName = None,
    llm: LlmName = None,
    model: ModelName = None,
    jobs: Annotated[int | None, typer.Option(help="Processes. [default: all cores]")] = None,
) -> None:
    """BiScale's headline experiment.

    DistServe, PlaceOnly, BiScale and rivals on 16 GPUs, the paper's range beside ours.
    """
    from biscale_env.reproduce.paper import arrivals_of, load_paper
    from biscale_env.reproduce.paper_report import write_report
    from controllers.placement.capacity_table import MIN_REQUESTS

    if jobs is not None and jobs < 1:
        raise BiscaleError(f"--jobs must be at least 1, got {jobs}")
    if members is not None and members < 0:
        raise BiscaleError(f"--members must not be negative, got {members}")
    experiment = load_paper(config or ("paper-quick" if quick else "paper"))
    given = {"members": members, "gpu": gpu, "llm": llm, "model": model}
    experiment = experiment.model_copy(
        update={key: value for key, value in given.items() if value is not None}
    )
    arrivals, about = arrivals_of(experiment, trace)
    if arrivals.duration_s < 2 * experiment.window_s:
        raise BiscaleError(
            f"{arrivals.name} lasts {arrivals.duration_s:g} s, but tuning and tables need a window of "
            f"{experiment.window_s:g} s each: use a longer trace"
        )
    scarce = min(len(half) for half in arrivals.split(0.5))
    if any(point.workload == "B" for point in experiment.points) and scarce < MIN_REQUESTS:
        raise BiscaleError(
            f"{arrivals.name} has {scarce} requests in one of its halves, but tuning and tables need at least "
            f"{MIN_REQUESTS} each: use a longer trace"
        )
    started = time.perf_counter()
    frame = run_experiment(experiment, arrivals, jobs or os.cpu_count() or 1)
    folder = out or Path("runs") / "paper"
    page = write_report(frame, experiment, about, folder)
    typer.echo(f"written: {page} ({(time.perf_counter() - started) / 60:.1f} min)")


def run_experiment(experiment: "PaperExperiment", arrivals: "Trace", jobs: int) -> "pd.DataFrame":
    """All rows of the experiment; the first task runs alone, so that kernels are compiled once."""
    import pandas as pd
    from rich.progress import Progress

    from biscale_env.reproduce.paper_jobs import tasks_of

    tasks = tasks_of(experiment)
    rows: list[dict[str, Any]] = []
    with Progress() as progress:
        bar = progress.add_task("operating points x plants", total=len(tasks))
        for found in _results(experiment, tasks, arrivals, jobs):
            rows += found
            progress.advance(bar)
    return pd.DataFrame(rows)


def _results(
    experiment: "PaperExperiment", tasks: "list[Task]", arrivals: "Trace", jobs: int
) -> Iterator[list[dict[str, Any]]]:
    import joblib

    from biscale_env.reproduce.paper_jobs import run_kept
    from controllers.placement.capacity_table import cache_folder

    kept = cache_folder().parent / "reproduce"

    yield run_kept(experiment, tasks[0], arrivals, kept)
    calls = (joblib.delayed(run_kept)(experiment, task, arrivals, kept) for task in tasks[1:])
    yield from joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(calls)


@commands.command("day")
def day(
    hours: Annotated[float, typer.Option(help="How long.")] = 24.0,
    rate: Annotated[
        float, typer.Option(help="Mean load, requests/s; 46 make 4 million requests a day.")
    ] = DAY_RPS,
    gpus: Annotated[int, typer.Option(help="GPUs of the cluster.")] = 16,
    dtype: Annotated[str, typer.Option(help="bf16 or fp8.")] = "fp8",
    slo: Annotated[str, typer.Option(help="SLO.")] = "biscale",
    lengths: Annotated[str, typer.Option(help="Length profile.")] = "sharegpt-like",
    alpha: Annotated[
        float, typer.Option(help="Head-room of tier 1 over the load of the window before.")
    ] = DAY_ALPHA,
    gpu: GpuName = None,
    llm: LlmName = None,
    model: ModelName = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for day.md and its figure. [default: runs/day]")
    ] = None,
) -> None:
    """A day of a cluster, streamed.

    DistServe, tier 1 alone, and both tiers (EcoFreq and slack inside), planned every 5 min.
    """
    from rich.progress import Progress

    from biscale_env.envs.cluster.cluster_settings import ClusterSettings
    from biscale_env.models import instance_hardware
    from biscale_env.reproduce.day_report import write_day

    count = round(hours * 12)
    if not 0 < hours <= 24 * 366 or count < 1:
        raise BiscaleError(
            f"--hours must be at least one window of 5 min and at most a year, got {hours:g}"
        )
    named = {"gpu": gpu, "llm": llm, "model": model}
    settings: dict[str, Any] = {k: v for k, v in named.items() if v is not None}
    settings |= {"gpus": gpus, "dtype": dtype, "slo": slo}
    days, totals = {}, {}
    with Progress(transient=True) as progress:
        bar = progress.add_task("windows of 5 min", total=3 * (count + 1))
        for title, result in _days(
            settings,
            rate,
            count * 300.0,
            lengths,
            alpha,
            lambda _: progress.advance(bar),
        ):
            days[title] = result.windows
            totals[title] = {
                **result.totals(),
                "seconds": result.seconds,
                "memory_mb": result.memory_mb,
            }
    hardware = instance_hardware(ClusterSettings.of(**settings).instance("prefill", 1))
    served = next(iter(totals.values()))["requests"]
    about = (
        f"Generated by `biscale reproduce day`: {served:,.0f} requests in {hours:g} h on {gpus} x "
        f"{hardware.gpu.name} ({dtype}), lengths {lengths}, rate shaped like a Monday of the Azure "
        f"2024 conversation trace, SLO `{slo}`, head-room {100 * alpha:g} % over the load of the "
        "window before, transitions not charged. Requests are generated window by window and never "
        "all in memory."
    )
    page = write_day(days, totals, about, out or Path("runs") / "day")
    for title, t in totals.items():
        typer.echo(
            f"{title}: {t['energy_j'] / 3.6e6:.1f} kWh, {t['j_per_token']:.3f} J per output token, "
            f"TTFT met {100 * t['attainment_ttft']:.2f} %, TPOT met {100 * t['attainment_tpot']:.2f} %, {t['seconds']:.0f} s"
        )
    typer.echo(f"written: {page}")


def _days(
    settings: dict[str, Any],
    rate: float,
    duration_s: float,
    lengths: str,
    alpha: float,
    progress: Any,
) -> "Iterator[tuple[str, Day]]":
    from biscale_env.envs.cluster.stream import daily_windows
    from biscale_env.reproduce.day import day_bench, day_systems, run_day
    from biscale_env.reproduce.systems import TunedSystem
    from controllers.placement.ilp import check_request

    check_request(rate, settings["gpus"], alpha)
    bench = day_bench(settings, rate, lengths)
    tuned = TunedSystem(alpha=alpha, prefill_margin=DAY_MARGIN, decode_margin=DAY_MARGIN)
    for title, system in day_systems().items():
        pieces = daily_windows(rate_rps=rate, duration_s=duration_s, lengths=lengths)
        yield title, run_day(system, tuned, bench, pieces, progress)
