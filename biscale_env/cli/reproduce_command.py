"""``biscale reproduce``: the published headline experiment, and a whole day of a cluster."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biscale_env.cli.instance_options import EpDegree, GpuName, IdlePower, LlmName, ModelName
from biscale_env.cli.trace_options import reads_trace
from biscale_env.core.errors import BiscaleError
from biscale_env.reproduce.day_defaults import DAY_ALPHA, DAY_RPS

if TYPE_CHECKING:
    from biscale_env.reproduce.paper import PaperExperiment
    from biscale_env.traces import Trace
    from biscale_env.traces.reading_options import ReadingOptions

commands = typer.Typer(help="Reproduce published experiments.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(commands, name="reproduce")


@commands.command("paper")
@reads_trace
def paper(
    *,
    quick: Annotated[
        bool, typer.Option("--quick", help="One rate, one load, few seeds: a few minutes.")
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
    ep: EpDegree = None,
    idle: IdlePower = None,
    jobs: Annotated[int | None, typer.Option(help="Processes. [default: all cores]")] = None,
    reading: "ReadingOptions",
) -> None:
    """BiScale's headline experiment.

    DistServe, PlaceOnly, BiScale and rivals on 16 GPUs, the paper's range beside ours.
    """
    from rich.progress import Progress

    from biscale_env.config.loader import validate
    from biscale_env.reproduce.paper import PaperExperiment, arrivals_of, load_paper
    from biscale_env.reproduce.paper_jobs import run_experiment
    from biscale_env.reproduce.paper_report import write_report

    if jobs is not None and jobs < 1:
        raise BiscaleError(f"--jobs must be at least 1, got {jobs}")
    if members is not None and members < 0:
        raise BiscaleError(f"--members must not be negative, got {members}")
    experiment = load_paper(config or ("paper-quick" if quick else "paper"))
    named = {"gpu": gpu, "llm": llm, "model": model, "ep": ep, "idle": idle}
    given = {"members": members, **named}
    changes = {key: value for key, value in given.items() if value is not None}
    experiment = validate(experiment.model_dump() | changes, PaperExperiment, "reproduce paper")
    arrivals, about = arrivals_of(experiment, trace, reading)
    _check_length(experiment, arrivals)
    started = time.perf_counter()
    with Progress() as progress:
        bar = progress.add_task("operating points x plants")

        def tell(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        frame = run_experiment(experiment, arrivals, jobs or os.cpu_count() or 1, tell)
    page = write_report(frame, experiment, about, out or Path("runs") / "paper")
    typer.echo(f"written: {page} ({(time.perf_counter() - started) / 60:.1f} min)")


def _check_length(experiment: "PaperExperiment", arrivals: "Trace") -> None:
    """Refuse a trace whose halves are too short to tune on one and show the other."""
    from controllers.placement.capacity_table import MIN_REQUESTS

    if arrivals.duration_s < 2 * experiment.window_s:
        raise BiscaleError(
            f"{arrivals.name} lasts {arrivals.duration_s:g} s, but tuning and tables need a window "
            f"of {experiment.window_s:g} s each: use a longer trace"
        )
    scarce = min(len(half) for half in arrivals.split(0.5))
    if any(point.workload == "B" for point in experiment.points) and scarce < MIN_REQUESTS:
        raise BiscaleError(
            f"{arrivals.name} has {scarce} requests in one of its halves, but tuning and tables "
            f"need at least {MIN_REQUESTS} each: use a longer trace"
        )


@commands.command("day")
def day(
    *,
    hours: Annotated[float, typer.Option(help="How long.")] = 24.0,
    rate: Annotated[
        float, typer.Option(help="Mean load, requests/s; 46 make 4 million requests a day.")
    ] = DAY_RPS,
    gpus: Annotated[int, typer.Option(help="GPUs of the cluster.")] = 16,
    dtype: Annotated[str, typer.Option(help="bf16 or fp8.")] = "fp8",
    slo: Annotated[str, typer.Option(help="SLO.")] = "biscale",
    lengths: Annotated[str, typer.Option(help="Length profile.")] = "sharegpt-like",
    alpha: Annotated[
        float, typer.Option(help="Headroom of tier 1 over the load of the window before.")
    ] = DAY_ALPHA,
    gpu: GpuName = None,
    llm: LlmName = None,
    model: ModelName = None,
    ep: EpDegree = None,
    idle: IdlePower = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for day.md and its figure. [default: runs/day]")
    ] = None,
) -> None:
    """A day of a cluster, streamed.

    DistServe, tier 1 alone, and both tiers (EcoFreq and slack inside), planned every 5 min.
    """
    from rich.progress import Progress

    from biscale_env.reproduce.day import WINDOW_S, DayPlan, run_days
    from biscale_env.reproduce.day_report import about_day, write_day

    count = round(hours * 3600 / WINDOW_S)
    if not 0 < hours <= 24 * 366 or count < 1:
        raise BiscaleError(
            f"--hours must be at least one window of 5 min and at most a year, got {hours:g}"
        )
    named = {"gpu": gpu, "llm": llm, "model": model, "ep": ep, "idle": idle}
    settings: dict[str, Any] = {k: v for k, v in named.items() if v is not None}
    settings |= {"gpus": gpus, "dtype": dtype, "slo": slo}
    plan = DayPlan(settings, rate, count * WINDOW_S, lengths, alpha)
    days, totals = {}, {}
    with Progress(transient=True) as progress:
        bar = progress.add_task("windows of 5 min", total=3 * (count + 1))
        for title, result in run_days(plan, lambda _: progress.advance(bar)):
            days[title] = result.windows
            totals[title] = {
                **result.totals(),
                "seconds": result.seconds,
                "memory_mb": result.memory_mb,
            }
    about = about_day(plan, next(iter(totals.values()))["requests"])
    page = write_day(days, totals, about, out or Path("runs") / "day")
    for title, t in totals.items():
        typer.echo(
            f"{title}: {t['energy_j'] / 3.6e6:.1f} kWh, {t['j_per_token']:.3f} J per output token, "
            f"TTFT met {100 * t['attainment_ttft']:.2f} %, "
            f"TPOT met {100 * t['attainment_tpot']:.2f} %, {t['seconds']:.0f} s"
        )
    typer.echo(f"written: {page}")
