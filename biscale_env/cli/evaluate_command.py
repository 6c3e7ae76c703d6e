"""``biscale evaluate``: a trained agent beside the references on named scenarios."""

import itertools
from pathlib import Path
from typing import Annotated

import typer

from biscale_env.cli.instance_options import (
    GpuName,
    InstanceFile,
    LlmName,
    ModelName,
    instance_changes,
)
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate")(evaluate)


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            help="Run directory of biscale train (or of its seeds), checkpoint, or 'agent' (the shipped ones)."
        ),
    ],
    scenario: Annotated[
        str, typer.Option(help="Comma-separated scenario names, see configs/scenarios.")
    ] = "synthetic",
    policies: Annotated[
        str | None,
        typer.Option(help="References beside it. [default: max, static-best, BiScale's own]"),
    ] = None,
    loads: Annotated[
        str | None,
        typer.Option(help="Comma-separated shares of capacity instead of the scenario's."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Workload seeds instead of the scenario's.")
    ] = None,
    delay: Annotated[
        float | None, typer.Option(help="Actuation delay, s. [default: the scenario's]")
    ] = None,
    gpu: GpuName = None,
    llm: LlmName = None,
    model: ModelName = None,
    instance: InstanceFile = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; default: runs/evaluate-<name>.")
    ] = None,
    phase: Annotated[
        str | None, typer.Option(help="prefill or decode; default: those of the checkpoints.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Also write the table with intervals to this Markdown file.")
    ] = None,
    robustness: Annotated[
        str | None,
        typer.Option(
            help="Instead of --scenario: conditions in distribution, shifted and unseen, see configs/robustness."
        ),
    ] = None,
    tuned: Annotated[
        bool, typer.Option(help="Tune the references' free parameters on other workloads first.")
    ] = False,
    oracle_seeds: Annotated[
        int | None,
        typer.Option(help="Workload seeds that the oracle gets, if it is among the policies."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted evaluation.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Processes; default: all cores.")] = None,
) -> None:
    """Evaluate an agent on scenarios, on the same workloads as the references.

    Table, run directory and report as of compare.
    """
    from biscale_env.evaluation.experiment.agent_jobs import checkpoints_of, phase_of, scenario_jobs
    from biscale_env.evaluation.experiment.compare import ComparisonJob
    from biscale_env.evaluation.experiment.input_digests import inputs_of
    from biscale_env.evaluation.experiment.robustness import robustness_jobs
    from biscale_env.evaluation.experiment.run_comparison import conclude, run_all
    from biscale_env.evaluation.experiment.scenarios import Infeasible
    from biscale_env.evaluation.runs.rundir import RunDirectory

    found = checkpoints_of(target)
    phases = sorted(
        {phase_of(path) for _, path in found} & ({phase} if phase else {"prefill", "decode"})
    )
    shares = [_share(text) for text in loads.split(",")] if loads else [None]
    names = [name.strip() for name in scenario.split(",") if name.strip()]
    changes = instance_changes(instance, gpu=gpu, llm=llm, model=model, seeds=seeds, delay_s=delay)
    planned: list[ComparisonJob] = []
    infeasible: list[Infeasible] = []
    if robustness is not None:
        names = [f"robustness {robustness}"]
        for each in phases:
            planned += robustness_jobs(robustness, each, found, changes, tuned, infeasible)
    for name, share, each in itertools.product([] if robustness else names, shares, phases):
        point = changes if share is None else changes | {"load": share}
        try:
            planned += scenario_jobs(name, each, found, policies, point, tuned, oracle_seeds)
        except Infeasible as error:
            infeasible.append(error)
    if not planned:
        raise (
            infeasible[0]
            if infeasible
            else BiscaleError("there is nothing to evaluate: give a scenario with --scenario")
        )
    folder = out or Path("runs") / f"evaluate-{Path(target).stem or 'agent'}"
    config = {
        "command": "evaluate",
        "target": target,
        "scenarios": names,
        "policies": policies or "",
        "tuned": tuned,
        **changes,
    }
    inputs = inputs_of(planned)
    with RunDirectory(folder, config, resume=resume, inputs=inputs) as run:
        run_all(run, planned, jobs, infeasible)
    conclude(folder)
    if table is not None:
        _write_table(folder, table, robustness is not None)


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BiscaleError(f"--loads takes numbers such as 0.5,0.75, got '{text}'") from None


def _write_table(folder: Path, path: Path, by_split: bool) -> None:
    from biscale_env.evaluation.experiment import robustness
    from biscale_env.evaluation.experiment.agent_jobs import shipped_seeds
    from biscale_env.evaluation.report import agent_table
    from biscale_env.evaluation.runs.run_view import load_run

    results = load_run(folder).results
    write_whole(
        path,
        robustness.markdown(results)
        if by_split
        else agent_table.markdown(results, shipped_seeds()),
    )
    print(f"table:         {path}")
