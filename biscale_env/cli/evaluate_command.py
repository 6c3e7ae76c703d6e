"""``biscale evaluate``: a trained agent beside the references on named scenarios."""

from pathlib import Path
from typing import Annotated, Any

import typer

from biscale_env.cli.comparison_options import (
    DelaySeconds,
    Jobs,
    OnePolicy,
    OutFolder,
    PhaseName,
    PolicyList,
    RayAddress,
    Resume,
    SeedCount,
    policy_entries,
)
from biscale_env.cli.instance_options import describes_instance
from biscale_env.core.errors import BiscaleError

Target = Annotated[
    str,
    typer.Argument(
        help="Run directory of biscale train (or of its seeds), checkpoint, 'agent' (the shipped "
        "ones), or any other policy by name, e.g. module:Class."
    ),
]
ScenarioNames = Annotated[
    str, typer.Option("--scenario", help="Comma-separated scenario names, see configs/scenarios.")
]
Loads = Annotated[
    str | None,
    typer.Option(
        "--loads", help="Comma-separated fractions of capacity instead of the scenario's."
    ),
]
TableFile = Annotated[
    Path | None,
    typer.Option("--table", help="Also write the table with intervals to this Markdown file."),
]
RobustnessName = Annotated[
    str | None,
    typer.Option(
        "--robustness",
        help="Instead of --scenario: conditions in distribution, shifted and unseen, see "
        "configs/robustness.",
    ),
]
Tuned = Annotated[
    bool,
    typer.Option("--tuned", help="Tune the references' free parameters on other workloads first."),
]
OracleSeeds = Annotated[
    int | None,
    typer.Option(
        "--oracle-seeds", help="Workload seeds that the oracle gets, if it is among the policies."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate")(evaluate)


@describes_instance("gpu", "llm", "model", "tp", "ep", "idle")
def evaluate(
    target: Target,
    *,
    scenario: ScenarioNames = "synthetic",
    policies: PolicyList = None,
    policy: OnePolicy = None,
    loads: Loads = None,
    seeds: SeedCount = None,
    delay: DelaySeconds = None,
    out: OutFolder = None,
    phase: PhaseName = None,
    table: TableFile = None,
    robustness: RobustnessName = None,
    tuned: Tuned = False,
    oracle_seeds: OracleSeeds = None,
    resume: Resume = False,
    jobs: Jobs = None,
    ray: RayAddress = None,
    instance: dict[str, Any],
) -> None:
    """Evaluate an agent on scenarios, on the same workloads as the references.

    Table, run directory and report as of compare.
    """
    from biscale_env.evaluation.experiment import evaluation_request
    from biscale_env.jobs.workers import Workers

    workers = Workers.of(jobs, ray)

    own = {"seeds": seeds, "delay_s": delay}
    asked = evaluation_request.EvaluationRequest(
        target,
        [name.strip() for name in scenario.split(",") if name.strip()],
        policy_entries(policies, policy),
        [_fraction(text) for text in loads.split(",")] if loads else (),
        phase,
        instance | {key: value for key, value in own.items() if value is not None},
        robustness,
        tuned,
        oracle_seeds,
    )
    evaluation_request.run_evaluation(asked, out, resume, workers, table)


def _fraction(text: str) -> float:
    from biscale_env.config.load_share import checked_load

    try:
        load = float(text)
    except ValueError:
        raise BiscaleError(f"--loads takes numbers such as 0.5,0.75, got '{text}'") from None
    return checked_load(load)
