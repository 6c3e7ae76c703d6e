"""``biscale compare``: every controller on the same workloads.

A table, a run directory, a report.
"""

from typing import TYPE_CHECKING, Annotated

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
    no_per_cent,
    policy_entries,
)
from biscale_env.cli.instance_options import (
    EpDegree,
    GpuName,
    IdlePower,
    InstanceFile,
    LlmName,
    ModelName,
    PrefixCacheName,
    instance_changes,
)
from biscale_env.cli.trace_options import only_given, reads_trace

if TYPE_CHECKING:
    from biscale_env.traces.reading.reading_options import ReadingOptions

TraceName = Annotated[
    str | None,
    typer.Option("--trace", help="Trace file or name; default: the embedded generated workload."),
]
ScenarioName = Annotated[
    str | None, typer.Option("--scenario", help="Named scenario, see configs/scenarios.")
]
ExperimentName = Annotated[
    str | None, typer.Option("--experiment", help="Frozen experiment, see configs/experiments.")
]
Windows = Annotated[
    str | None,
    typer.Option(
        "--windows",
        metavar="LENGTH/EVERY",
        help="Cut a trace of several days into windows, e.g. 30min/1d: early days tune, the "
        "others are judged.",
    ),
]
SloName = Annotated[
    str | None,
    typer.Option(
        "--slo", help="biscale, mlperf-interactive, mlperf-server, distserve, or a YAML file."
    ),
]
Load = Annotated[
    float | None,
    typer.Option(
        "--load",
        help="Fraction of one instance's capacity at max clock; default: the scenario's, else 0.5.",
        callback=no_per_cent,
    ),
]
GpuCount = Annotated[
    int | None, typer.Option("--tp", help="GPUs per instance; default: the scenario's, else 4.")
]
DtypeName = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="bf16, fp8 or mxfp4; default: the scenario's, else as the LLM is published.",
    ),
]
Tune = Annotated[
    bool,
    typer.Option("--tune", help="Choose every policy's free parameters on tuning workloads first."),
]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick", help="Two minutes of workload (five of an experiment's traces), one seed."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(compare)


@reads_trace
def compare(
    *,
    trace: TraceName = None,
    windows: Windows = None,
    scenario: ScenarioName = None,
    experiment: ExperimentName = None,
    phase: PhaseName = None,
    slo: SloName = None,
    load: Load = None,
    policies: PolicyList = None,
    policy: OnePolicy = None,
    seeds: SeedCount = None,
    tp: GpuCount = None,
    ep: EpDegree = None,
    dtype: DtypeName = None,
    delay: DelaySeconds = None,
    gpu: GpuName = None,
    llm: LlmName = None,
    model: ModelName = None,
    instance: InstanceFile = None,
    idle: IdlePower = None,
    prefix_cache: PrefixCacheName = None,
    out: OutFolder = None,
    tune: Tune = False,
    quick: Quick = False,
    resume: Resume = False,
    jobs: Jobs = None,
    ray: RayAddress = None,
    reading: "ReadingOptions",
) -> None:
    """Compare controllers on one scenario, or on all points of an experiment.

    Write table, figures and every number behind them.
    """
    from biscale_env.evaluation.experiment import comparison
    from biscale_env.jobs.workers import Workers

    workers = Workers.of(jobs, ray)

    changes = instance_changes(
        instance,
        gpu=gpu,
        llm=llm,
        model=model,
        slo=slo,
        tp=tp,
        ep=ep,
        dtype=dtype,
        idle=idle,
        prefix_cache=prefix_cache,
    ) | {
        "trace": trace,
        "windows": windows,
        "load": load,
        "seeds": seeds,
        "delay_s": delay,
        "reading": only_given(reading),
    }
    names = policy_entries(policies, policy)
    if experiment is None:
        asked = comparison.compare_scenario(scenario, changes, names, phase, tune, quick)
    else:
        asked = comparison.compare_experiment(experiment, changes, names, phase, quick)
    comparison.run_comparison(asked, out, resume, workers)
