"""``biscale compare``: every controller on the same workloads.

A table, a run directory, a report.
"""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biscale_env.cli.instance_options import (
    GpuName,
    InstanceFile,
    LlmName,
    ModelName,
    instance_changes,
)
from biscale_env.core.errors import BiscaleError

if TYPE_CHECKING:
    from biscale_env.evaluation.experiment.experiments import Experiment
    from biscale_env.evaluation.experiment.scenarios import Scenario

DEFAULT_LOAD = 0.5
DEFAULT_SECONDS = 600.0
QUICK_SECONDS = 120.0


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(compare)


def compare(
    trace: Annotated[
        str | None,
        typer.Option(help="Trace file or name; default: the embedded generated workload."),
    ] = None,
    scenario: Annotated[
        str | None, typer.Option(help="Named scenario, see configs/scenarios.")
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="Frozen experiment, see configs/experiments.")
    ] = None,
    phase: Annotated[str | None, typer.Option(help="prefill or decode; default: both.")] = None,
    slo: Annotated[
        str | None,
        typer.Option(help="biscale, mlperf-interactive, mlperf-server, distserve, or a YAML file."),
    ] = None,
    load: Annotated[
        float | None,
        typer.Option(help="Share of one instance's capacity at max clock. [default: 0.5]"),
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(help="Comma-separated; 'all' for the defaults, name=build to rename."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Workload seeds. [default: 3]")] = None,
    tp: Annotated[int | None, typer.Option(help="GPUs per instance. [default: 4]")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp8. [default: bf16]")] = None,
    delay: Annotated[
        float | None, typer.Option(help="Actuation delay in seconds; default: the model's.")
    ] = None,
    gpu: GpuName = None,
    llm: LlmName = None,
    model: ModelName = None,
    instance: InstanceFile = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; default: runs/<time>-<scenario>.")
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Choose every policy's free parameters on tuning workloads first."
        ),
    ] = False,
    quick: Annotated[bool, typer.Option(help="Two minutes of workload, one seed.")] = False,
    resume: Annotated[
        bool,
        typer.Option(help="Continue an interrupted run (--out, or the newest of this scenario)."),
    ] = False,
    jobs: Annotated[int | None, typer.Option(help="Processes; default: all cores.")] = None,
) -> None:
    """Compare controllers on one scenario, or on all points of an experiment.

    Write table, figures and every number behind them.
    """
    from biscale_env.evaluation.experiment.input_digests import inputs_of
    from biscale_env.evaluation.experiment.policy_jobs import parse
    from biscale_env.evaluation.experiment.run_comparison import conclude, prepare, run_all
    from biscale_env.evaluation.experiment.scenarios import PHASES
    from biscale_env.evaluation.runs.rundir import RunDirectory

    changes = instance_changes(
        instance, gpu=gpu, llm=llm, model=model, slo=slo, tp=tp, dtype=dtype
    ) | {"trace": trace, "load": load, "seeds": seeds, "delay_s": delay}
    if experiment is None:
        phases = _phases(phase, PHASES)
        points = [_scenario(scenario, changes, quick)]
        oracle_seeds: dict[str, int] | None = None
        name, chosen, tuned = points[0].name, parse(policies, phases), tune
    else:
        frozen, points = _experiment(experiment, changes, phase, quick)
        phases, oracle_seeds = frozen.phases, frozen.oracle_seeds_by_phase
        name, chosen, tuned = (
            frozen.name,
            parse(policies or ",".join(frozen.policies), phases),
            frozen.tune,
        )
    folder = _folder(out, name, resume)
    config = {
        "command": "compare",
        "points": [point.model_dump() for point in points],
        "phases": list(phases),
        "policies": chosen,
        "tune": tuned,
    }
    prepared = prepare(points, phases, chosen, tuned, oracle_seeds)
    seed_note = {"workloads": points[0].seeds}
    with RunDirectory(
        folder, config, resume=resume, inputs=inputs_of(prepared.jobs), seeds=seed_note
    ) as run:
        run_all(run, prepared.jobs, jobs, prepared.infeasible)
    conclude(folder)


def _phases(phase: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    if phase is None:
        return known
    if phase not in known:
        raise BiscaleError(f"unknown phase '{phase}': choose prefill or decode")
    return (phase,)


def _scenario(name: str | None, changes: dict[str, Any], quick: bool) -> "Scenario":
    from biscale_env.config.loader import validate
    from biscale_env.evaluation.experiment.scenarios import Scenario, load_scenario

    base = (
        load_scenario(name).model_dump()
        if name
        else {"name": "synthetic-default", "load": DEFAULT_LOAD, "duration_s": DEFAULT_SECONDS}
    )
    given = {key: value for key, value in changes.items() if value is not None}
    if "trace" in given:
        base |= {"name": Path(given["trace"]).stem, "duration_s": None}
    if quick:
        base |= {"duration_s": QUICK_SECONDS, "seeds": 1}
    return validate(base | given, Scenario, "compare")


def _experiment(
    name: str, changes: dict[str, Any], phase: str | None, quick: bool
) -> "tuple[Experiment, list[Scenario]]":
    from biscale_env.evaluation.experiment.experiments import load_experiment

    given = {key: value for key, value in changes.items() if value is not None}
    hardware = {"gpu", "llm", "model"}
    allowed = {"trace", "seeds", "load", *hardware}
    if set(given) - allowed:
        raise BiscaleError(
            f"--experiment is frozen: leave out --{min(set(given) - allowed).removesuffix('_s')}"
        )
    frozen = load_experiment(name)
    update: dict[str, Any] = {key: given[key] for key in hardware & set(given)}
    if phase is not None:
        update["phases"] = (phase,)
    if "seeds" in given or quick:
        update["seeds"] = 1 if quick else given["seeds"]
    if "load" in given:
        update["loads"] = (given["load"],)
    frozen = frozen.model_copy(update=update)
    points = frozen.scenarios()
    if quick:
        points = [p.model_copy(update={"duration_s": QUICK_SECONDS}) for p in points]
    return frozen, points


def _folder(out: Path | None, name: str, resume: bool) -> Path:
    if out is not None:
        return out
    if resume:
        runs = sorted(Path("runs").glob(f"*-{name}"))
        if not runs:
            raise BiscaleError(
                f"there is no run of {name} under runs/ to resume; give its folder with --out"
            )
        return runs[-1]
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
