"""``biscale capacity``: the load that one instance serves within its SLO, and how it was found."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biscale_env.cli.instance_options import describes_instance
from biscale_env.cli.trace_options import reads_trace

if TYPE_CHECKING:
    from biscale_env.envs.loads.capacity import Capacity
    from biscale_env.envs.plant import Plant
    from biscale_env.traces import Trace
    from biscale_env.traces.reading.reading_options import ReadingOptions


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("capacity")(capacity)


@reads_trace
@describes_instance("slo", "gpu", "llm", "model", "tp", "ep", "dtype", "idle", "prefix_cache")
def capacity(
    phase: Annotated[str, typer.Argument(help="prefill or decode")],
    *,
    trace: Annotated[
        str | None,
        typer.Option(help="Trace file or name; default: the embedded generated workload."),
    ] = None,
    clock: Annotated[
        float | None, typer.Option(help="SM clock in MHz; default: the highest.")
    ] = None,
    member: Annotated[int, typer.Option(help="Ensemble member, -1 nominal.")] = -1,
    parts: Annotated[
        bool,
        typer.Option(
            "--parts",
            help="Both halves of the trace instead of the whole: a comparison's loads are shares "
            "of the capacity of the half that is judged or tuned on.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    instance: dict[str, Any],
    reading: "ReadingOptions",
) -> None:
    """Bisect for the highest load within the SLO.

    Loads are made by choosing requests, time is never stretched.
    """
    from biscale_env.core.errors import BiscaleError
    from biscale_env.envs.loads.capacity import find_capacity, profile_capacity
    from biscale_env.envs.loads.prefix_hits import with_cache
    from biscale_env.envs.loads.workloads import capacity_sample
    from biscale_env.envs.options import DEFAULT_PROFILE
    from biscale_env.envs.plant import Plant, PlantSettings
    from biscale_env.traces import load_named

    plant = Plant(PlantSettings.of(phase, drain=True, **instance))
    freq = plant.gpu.freq_max_mhz if clock is None else plant.gpu.check_clock(clock)
    if parts and not trace:
        raise BiscaleError("--parts are those of a trace: give one with --trace")
    if trace:
        whole = with_cache(plant.settings.instance.prefix_cache, load_named(trace, reading))
        samples = list(whole.split(0.5)) if parts else [whole]
        found = [find_capacity(plant, sample, freq, member=member) for sample in samples]
    else:
        rule = plant.settings.instance.prefix_cache
        samples = [with_cache(rule, capacity_sample(DEFAULT_PROFILE))]
        found = [profile_capacity(plant, DEFAULT_PROFILE, freq, member)]
    if as_json:
        told = [_told(plant, *one, freq) for one in zip(samples, found, strict=True)]
        print(json.dumps(told if parts else told[0]))
        return
    for sample, capacity in zip(samples, found, strict=True):
        _tell(plant, sample, freq, capacity)


def _told(plant: "Plant", sample: "Trace", found: "Capacity", freq_mhz: float) -> dict[str, Any]:
    return {
        "phase": plant.phase,
        "trace": sample.name,
        "slo": plant.settings.slo,
        "freq_mhz": freq_mhz,
        "capacity_rps": found.rate_rps,
        "attainment": found.attainment,
        "tried": [{"rate_rps": r, "attainment": a} for r, a in found.tried],
    }


def _tell(plant: "Plant", sample: "Trace", freq_mhz: float, found: "Capacity") -> None:
    from biscale_env.envs.loads.capacity import slowest_alone_s

    s = plant.settings
    for rate, attainment in sorted(found.tried):
        verdict = "met" if attainment >= plant.slo.attainment else "missed"
        print(f"{rate:9.3f} req/s   attainment {attainment:8.3%}   {verdict}")
    what = f"{plant.phase} instance (TP {s.tp}, {s.dtype}, {freq_mhz:g} MHz)"
    if found.rate_rps > 0:
        print(f"capacity of one {what} on {sample.name}: {found.rate_rps:.3f} req/s")
        return
    alone_s = slowest_alone_s(plant, sample)
    print(
        f"infeasible: no load meets SLO '{s.slo}' on one {what} with {sample.name}; at max clock, "
        f"with the instance to itself, its slowest request takes {1e3 * alone_s:.0f} of "
        f"{1e3 * plant.slo.bound_s(plant.phase):.0f} ms"
    )
