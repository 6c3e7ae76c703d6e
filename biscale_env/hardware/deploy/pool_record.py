"""The instances of a phase together, as one run record: the same tables as of a single pair."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.runs.record import INSTANCE, RunRecord
from biscale_env.hardware.deploy.deployed_raw import DeployedRaw
from biscale_env.hardware.replay.assemble import run_record
from biscale_env.hardware.replay.recorder import EnergyCurve

SUMMED = ("iterations", "records_lost", "clock_switches", "output_tokens")
LARGEST = ("decision_time_median_s", "decision_time_p99_s")


def top_mhz(raw: DeployedRaw, name: str) -> float:
    """Highest clock of an instance's GPU, MHz."""
    phase = raw.deployment.instances[name].phase
    return Plant(PlantSettings.of(phase, instance=raw.deployment.spec(name))).gpu.freq_max_mhz


def instance_records(raw: DeployedRaw, phase: str) -> dict[str, RunRecord]:
    """Run record of every instance of a phase that answered a request.

    Requests that never got to an instance are counted with the first.

    Raises:
        BiscaleError: not one request was answered in the phase.
    """
    found: dict[str, RunRecord] = {}
    reason = "none was sent"
    for name in raw.deployment.of_phase(phase):
        try:
            alone = raw.of_instance(name, unrouted=not found)
            found[name] = run_record(alone, phase, top_mhz(raw, name))
        except BiscaleError as error:
            reason = str(error)
    if not found:
        raise BiscaleError(f"no request was answered in {phase}: {reason}")
    return found


def end_s(records: Mapping[str, RunRecord]) -> float:
    """When the last of them ended, s from the start."""
    return max(record.duration_s for record in records.values())


def energy_j(raw: DeployedRaw, name: str, until_s: float) -> float:
    """Energy of one instance from the start of the trace for so long, while in service, J."""
    curve = EnergyCurve(raw.telemetry, name)
    spans = raw.in_service(name, until_s)
    return sum(curve.between(raw.start_s + begin, raw.start_s + end) for begin, end in spans)


def pool_record(raw: DeployedRaw, phase: str) -> RunRecord:
    """All instances of a phase; energy of all of them up to the last answer of the phase.

    Raises:
        BiscaleError: not one request was answered in the phase.
    """
    parts = instance_records(raw, phase)
    records, duration_s = list(parts.values()), end_s(parts)
    names = raw.deployment.of_phase(phase)
    totals = {
        "energy_j": sum(energy_j(raw, name, duration_s) for name in names),
        "duration_s": duration_s,
    }
    for merge, keys in ((sum, SUMMED), (max, LARGEST)):
        for key in keys:
            values = [r.totals[key] for r in records if key in r.totals]
            if values:
                totals[key] = float(merge(values))
    labels = dict(records[0].labels)
    labels["instances"] = len(names)
    labels["instance_names"] = " ".join(parts)
    labels["instance_gpus"] = " ".join(str(len(raw.deployment.instances[n].gpus)) for n in parts)
    labels["unknown_tpot_requests"] = sum(int(r.labels["unknown_tpot_requests"]) for r in records)
    labels["failed_requests"] = sum(r.failed for r in raw.requests)
    return dataclasses.replace(
        records[0],
        rate_rps=len(raw.requests) / max(duration_s, 1e-9),
        n_gpus=sum(len(raw.deployment.instances[name].gpus) for name in names),
        requests=_joined([r.requests for r in records], "arrival_s"),
        timeline=_joined([_numbered(r.timeline, k) for k, r in enumerate(records)], "time_s"),
        totals=totals,
        labels=labels,
    )


def _numbered(timeline: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A timeline with the number of its instance."""
    return {**timeline, INSTANCE: np.full(len(timeline["time_s"]), number)}


def _joined(tables: list[Mapping[str, Any]], by: str) -> dict[str, NDArray[Any]]:
    """Tables of columns one behind another, in the order of one of the columns."""
    both = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    order = np.argsort(both[by], kind="stable")
    return {name: values[order] for name, values in both.items()}
