"""``biscale capacity``: the load that one instance serves within its SLO, and how it was found."""

import json
from typing import Annotated

import typer

from biscale_env.cli.instance_options import (
    GpuName,
    InstanceFile,
    LlmName,
    ModelName,
    instance_changes,
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("capacity")(capacity)


def capacity(
    phase: Annotated[str, typer.Argument(help="prefill or decode")],
    trace: Annotated[
        str | None,
        typer.Option(help="Trace file or name; default: the embedded generated workload."),
    ] = None,
    slo: Annotated[
        str | None, typer.Option(help="SLO, name or YAML file. [default: biscale]")
    ] = None,
    tp: Annotated[int | None, typer.Option(help="GPUs per instance. [default: 4]")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp8. [default: bf16]")] = None,
    gpu: GpuName = None,
    llm: LlmName = None,
    model: ModelName = None,
    instance: InstanceFile = None,
    clock: Annotated[
        float | None, typer.Option(help="SM clock in MHz; default: the highest.")
    ] = None,
    member: Annotated[int, typer.Option(help="Ensemble member, -1 nominal.")] = -1,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Bisect for the highest load within the SLO.

    Loads are made by choosing requests, time is never stretched.
    """
    from biscale_env.envs.capacity import find_capacity, profile_capacity, slowest_alone_s
    from biscale_env.envs.options import DEFAULT_PROFILE
    from biscale_env.envs.plant import Plant, PlantSettings
    from biscale_env.envs.workloads import capacity_sample
    from biscale_env.traces import load_named

    given = instance_changes(instance, gpu=gpu, llm=llm, model=model, slo=slo, tp=tp, dtype=dtype)
    plant = Plant(PlantSettings.of(phase, drain=True, **given))
    slo, tp, dtype = plant.settings.slo, plant.settings.tp, plant.settings.dtype
    sample = load_named(trace) if trace else capacity_sample(DEFAULT_PROFILE)
    freq = plant.gpu.freq_max_mhz if clock is None else plant.gpu.check_clock(clock)
    found = (
        find_capacity(plant, sample, freq, member=member)
        if trace
        else profile_capacity(plant, DEFAULT_PROFILE, freq, member)
    )
    if as_json:
        told = {
            "phase": phase,
            "trace": sample.name,
            "slo": slo,
            "freq_mhz": freq,
            "capacity_rps": found.rate_rps,
            "attainment": found.attainment,
            "tried": [{"rate_rps": r, "attainment": a} for r, a in found.tried],
        }
        print(json.dumps(told))
        return
    for rate, attainment in sorted(found.tried):
        verdict = "met" if attainment >= plant.slo.attainment else "missed"
        print(f"{rate:9.3f} req/s   attainment {attainment:8.3%}   {verdict}")
    what = f"{phase} instance (TP {tp}, {dtype}, {freq:g} MHz)"
    if found.rate_rps <= 0:
        alone_s = slowest_alone_s(plant, sample)
        print(
            f"infeasible: no load meets SLO '{slo}' on one {what} with {sample.name}; at max clock, "
            f"with the instance to itself, its slowest request takes {1e3 * alone_s:.0f} of "
            f"{1e3 * plant.slo.bound_s(phase):.0f} ms"
        )
        return
    print(f"capacity of one {what} on {sample.name}: {found.rate_rps:.3f} req/s")
