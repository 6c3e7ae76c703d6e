"""``biscale reproduce``: the published headline experiment, and a whole day of a cluster."""

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biscale_env.cli.comparison_options import RayAddress
from biscale_env.cli.instance_options import describes_instance
from biscale_env.cli.trace_options import reads_trace
from biscale_env.cli.train_command import MARL
from biscale_env.core.errors import BiscaleError
from biscale_env.core.extras import need_packages
from biscale_env.reproduce.day_defaults import DAY_ALPHA, DAY_RPS

if TYPE_CHECKING:
    from biscale_env.jobs.workers import Workers
    from biscale_env.reproduce.cells import CellsPlan
    from biscale_env.reproduce.day import DayPlan
    from biscale_env.reproduce.paper import PaperExperiment
    from biscale_env.traces import Trace
    from biscale_env.traces.reading.reading_options import ReadingOptions

DaysAndTotals = tuple[Mapping[str, Sequence[Mapping[str, Any]]], Mapping[str, Mapping[str, float]]]
OF_AN_INSTANCE = ("gpu", "llm", "model", "ep", "idle", "prefix_cache")
commands = typer.Typer(help="Reproduce published experiments.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the command group."""
    app.add_typer(commands, name="reproduce")


@commands.command("paper")
@reads_trace
@describes_instance(*OF_AN_INSTANCE, with_file=False)
def paper(
    *,
    quick: Annotated[
        bool, typer.Option("--quick", help="One rate, one load, few seeds: a few minutes.")
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(help="Experiment (configs/reproductions) or a YAML file; default: paper."),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(help="Trace file or name behind workload B; default: the experiment's."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for paper.md, figures and rows; default: runs/paper."),
    ] = None,
    members: Annotated[
        int | None, typer.Option(help="Members of the model ensemble; default: the experiment's.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes; default: all cores.")] = None,
    ray: RayAddress = None,
    instance: dict[str, Any],
    reading: "ReadingOptions",
) -> None:
    """BiScale's headline experiment.

    DistServe, PlaceOnly, BiScale and rivals on 16 GPUs, the paper's range beside ours.
    """
    from biscale_env.config.loader import validate
    from biscale_env.jobs.progress import JobProgress
    from biscale_env.jobs.workers import Workers
    from biscale_env.reproduce.paper import PaperExperiment, arrivals_of, load_paper
    from biscale_env.reproduce.paper_jobs import run_experiment
    from biscale_env.reproduce.paper_report import write_report

    workers = Workers.of(jobs, ray)
    if members is not None and members < 0:
        raise BiscaleError(f"--members must not be negative, got {members}")
    experiment = load_paper(config or ("paper-quick" if quick else "paper"))
    changes = instance if members is None else {"members": members, **instance}
    experiment = validate(experiment.model_dump() | changes, PaperExperiment, "reproduce paper")
    arrivals, about = arrivals_of(experiment, trace, reading)
    _check_length(experiment, arrivals)
    started = time.perf_counter()
    with JobProgress("operating points x plants") as progress:
        frame = run_experiment(experiment, arrivals, workers, progress.tell)
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
@describes_instance(*OF_AN_INSTANCE, with_file=False)
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
    out: Annotated[
        Path | None, typer.Option(help="Folder for day.md and its figure; default: runs/day.")
    ] = None,
    cells: Annotated[
        int,
        typer.Option(help="Clusters of --gpus each behind a front router; --rate is of each."),
    ] = 1,
    front: Annotated[
        str, typer.Option(help="Front router: random or round_robin over the cells.")
    ] = "random",
    jobs: Annotated[
        int | None, typer.Option(help="Processes for cells; default: all cores.")
    ] = None,
    ray: RayAddress = None,
    instance: dict[str, Any],
) -> None:
    """A day of a cluster, streamed.

    DistServe, tier 1 alone, and both tiers (EcoFreq and slack inside), planned every 5 min.
    """
    from biscale_env.jobs.workers import Workers
    from biscale_env.reproduce.cells import CellsPlan
    from biscale_env.reproduce.day import WINDOW_S, DayPlan
    from biscale_env.reproduce.day_report import about_cells, about_day, write_day

    workers = Workers.of(jobs, ray)
    if cells == 1 and (jobs is not None or ray is not None):
        raise BiscaleError("--jobs and --ray run groups of cells at once: give --cells")
    count = round(hours * 3600 / WINDOW_S)
    if not 0 < hours <= 24 * 366 or count < 1:
        raise BiscaleError(
            f"--hours must be at least one window of 5 min and at most a year, got {hours:g}"
        )
    settings = instance | {"gpus": gpus, "dtype": dtype, "slo": slo}
    plan = CellsPlan(DayPlan(settings, rate, count * WINDOW_S, lengths, alpha), cells, front)
    started = time.perf_counter()
    days, totals = _one_cell(plan.day) if cells == 1 else _many_cells(plan, workers)
    requests = next(iter(totals.values()))["requests"]
    about = about_day(plan.day, requests)
    if cells > 1:
        took_s = time.perf_counter() - started
        about = about_cells(plan, requests, workers, took_s)
    page = write_day(days, totals, about, out or Path("runs") / "day")
    for title, t in totals.items():
        typer.echo(
            f"{title}: {t['energy_j'] / 3.6e6:.1f} kWh, {t['j_per_token']:.3f} J per output token, "
            f"TTFT met {100 * t['attainment_ttft']:.2f} %, "
            f"TPOT met {100 * t['attainment_tpot']:.2f} %, {t['seconds']:.0f} s"
        )
    typer.echo("prefix cache: off, since the requests of a day are made without shared prompts")
    typer.echo(f"written: {page}")


def _one_cell(plan: "DayPlan") -> DaysAndTotals:
    """Windows and totals by system."""
    from biscale_env.jobs.progress import JobProgress
    from biscale_env.reproduce.day import WINDOW_S, run_days

    days, totals = {}, {}
    steps, done = 3 * (round(plan.duration_s / WINDOW_S) + 1), itertools.count(1)
    with JobProgress("windows of 5 min", steps, transient=True) as progress:
        for title, result in run_days(plan, lambda _: progress.tell(next(done))):
            days[title], totals[title] = result.windows, result.figures()
    return days, totals


def _many_cells(plan: "CellsPlan", workers: "Workers") -> DaysAndTotals:
    """The same of many cells; the bar follows files that the workers let grow."""
    import tempfile

    from biscale_env.jobs.progress import JobProgress
    from biscale_env.reproduce.cells import groups_of, run_cells
    from biscale_env.reproduce.day import WINDOW_S

    windows = round(plan.day.duration_s / WINDOW_S)
    steps, groups_done = len(groups_of(plan.cells, workers)) * windows, itertools.count(1)
    bar = JobProgress("windows of 5 min", steps, transient=True)
    with tempfile.TemporaryDirectory() as name, bar as progress:
        marks = Path(name) if workers.ray is None else None
        done = threading.Event()

        def follow() -> None:
            while marks is not None and not done.wait(1.0):
                progress.tell(sum(p.stat().st_size for p in marks.iterdir()))

        def note() -> None:
            if marks is None:
                progress.tell(windows * next(groups_done))

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            found, changes = run_cells(plan, workers, marks, note)
        finally:
            done.set()
            follower.join()
    days = {title: day.windows for title, day in found.items()}
    return days, {t: day.figures() | {"changes": float(changes[t])} for t, day in found.items()}


@commands.command("coarse")
def coarse(
    *,
    agent: Annotated[
        str, typer.Option(help="The learned policy: agent, a run of biscale train cluster, .npz.")
    ] = "agent",
    config: Annotated[
        str | None, typer.Option(help="Config of the training: cluster, windows, its days.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for coarse.md and coarse.csv; default: runs/reproduce-coarse."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes; default: all cores.")] = None,
    ray: RayAddress = None,
) -> None:
    """The learned coarse policy beside BiScale's tier 1, on days that neither has seen."""
    from agents.coarse.coarse_config import load_coarse_config
    from biscale_env.core.files import write_whole
    from biscale_env.jobs.progress import JobProgress
    from biscale_env.jobs.workers import Workers
    from biscale_env.reproduce.coarse import (
        SPLITS,
        coarse_markdown,
        compare_coarse,
        tuned_alpha,
    )
    from controllers.placement.coarse_rules import ALPHAS

    mine, workers = load_coarse_config(config), Workers.of(jobs, ray)
    folder = out or Path("runs") / "reproduce-coarse"
    folder.mkdir(parents=True, exist_ok=True)
    alpha, _ = tuned_alpha(mine, workers, typer.echo)
    less = max((a for a in ALPHAS if a < alpha), default=alpha)  # the frontier's next point
    policies = list(dict.fromkeys([f"ilp:{less:g}", f"ilp:{alpha:g}", agent]))
    steps = len(policies) * sum(len(split.services) * len(split.days) for split in SPLITS)
    with JobProgress("days under a policy", steps, transient=True) as progress:
        frame = compare_coarse(mine, policies, workers, lambda done, _: progress.tell(done), SPLITS)
    required = mine.make_env().plant.slo.attainment
    table = coarse_markdown(frame, f"ilp:{alpha:g}", required)
    write_whole(folder / "coarse.csv", frame.to_csv(index=False))
    write_whole(folder / "coarse.md", table + "\n")
    typer.echo(table)
    typer.echo(f"written: {folder / 'coarse.md'}")


@commands.command("multi")
def multi(
    *,
    agent: Annotated[
        Path | None,
        typer.Option(
            help="The shared agents: a run of biscale train multi; without it they are left out."
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Config of the training: clusters, interval.")
    ] = None,
    systems: Annotated[
        str | None,
        typer.Option(
            help="Some of max,static,tier2,independent,independent-each (asked before every "
            "iteration, not at intervals),shared; default: all, shared with --agent."
        ),
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Judged workloads per cluster.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for multi.md and multi.csv; default: runs/reproduce-multi."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes; default: all cores.")] = None,
    ray: RayAddress = None,
) -> None:
    """Many agents beside BiScale's tier 2 in the same clusters, on workloads nobody has seen."""
    need_packages("many agents need", "marl", MARL)
    from agents.multi.multi_config import load_multi_config
    from biscale_env.config.slo import load_slo
    from biscale_env.core.files import write_whole
    from biscale_env.jobs.progress import JobProgress
    from biscale_env.jobs.workers import Workers
    from biscale_env.reproduce.multi import MultiPlan, cells_of, compare_multi, multi_markdown
    from biscale_env.reproduce.multi_systems import NO_SHARED, SHARED, TITLES, of_run

    mine, workers = load_multi_config(config), Workers.of(jobs, ray)
    asked = [s for s in TITLES if s != SHARED or agent] if systems is None else systems.split(",")
    for name in asked:
        if name not in TITLES:
            raise BiscaleError(f"unknown system '{name}': choose from {', '.join(TITLES)}")
    if windows is not None and windows < 1:
        raise BiscaleError(f"--windows must be at least 1, got {windows}")
    if SHARED in asked and agent is None:
        raise BiscaleError(NO_SHARED)
    agents = None if agent is None else of_run(agent)
    changed = {} if windows is None else {"n_judged": windows}
    plan = MultiPlan(interval_s=mine.interval_s, **changed)
    cells, folder = cells_of(mine), out or Path("runs") / "reproduce-multi"
    folder.mkdir(parents=True, exist_ok=True)
    with JobProgress("clusters x systems", len(cells) * len(asked), transient=True) as progress:
        told = lambda done, _: progress.tell(done)  # noqa: E731
        frame = compare_multi(cells, asked, plan, agents, workers, told)
    table = multi_markdown(frame, load_slo("biscale").attainment)
    write_whole(folder / "multi.csv", frame.to_csv(index=False))
    write_whole(folder / "multi.md", table + "\n")
    typer.echo(table)
    typer.echo(f"written: {folder / 'multi.md'}")
