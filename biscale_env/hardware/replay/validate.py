"""How far simulation and reality are apart: the same requests and decisions, simulated beside."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.runs.record import Column, RunRecord
from biscale_env.evaluation.stats.metrics import results_row
from biscale_env.hardware.loop.recorded_policy import RecordedPolicy
from biscale_env.hardware.replay.assemble import TOKEN_COLUMNS, delays_s, run_record
from biscale_env.hardware.replay.raw_log import Raw
from biscale_env.traces import Trace

Floats = NDArray[np.float64]
# a simulated iteration may begin this much before the real one whose decision it takes
LATENESS_S = 0.005
TOLERANCES = {"energy_j": 0.02, "p99": 0.05}
QUANTITIES = {
    phase: (
        *(f"{metric}_{q}_s" for q in ("p50", "p90", "p99")),
        "attainment",
        "energy_j",
        "mean_power_w",
        "duration_s",
    )
    for phase, metric in (("prefill", "ttft"), ("decode", "tpot"))
}


@dataclass(frozen=True)
class Agreement:
    """One quantity, measured and simulated.

    Attributes:
        phase: ``prefill`` or ``decode``.
        quantity: name with its unit.
        measured: on the engine.
        simulated: by the model.
        tolerance: relative deviation that is asked for; NaN where none is.
    """

    phase: str
    quantity: str
    measured: float
    simulated: float
    tolerance: float = math.nan

    @property
    def deviation(self) -> float:
        """Simulated relative to measured, minus one."""
        return self.simulated / self.measured - 1.0 if self.measured else math.nan

    @property
    def agrees(self) -> bool:
        """Whether it lies within the tolerance; True without one, or a measurement."""
        return (
            math.isnan(self.tolerance)
            or math.isnan(self.measured)
            or abs(self.deviation) <= self.tolerance
        )


def simulate(
    plant: Plant, trace: Trace, decisions: RecordedPolicy, member: int = -1
) -> tuple[Floats, float, float]:
    """Run the simulator on measured arrivals under recorded decisions.

    Args:
        plant: with the measured actuation delay.
        trace: arrivals as measured at this phase.
        decisions: clock decided at the engine's times of the records.
        member: ensemble member.

    Returns:
        ``(finish_s, energy in J, duration in s)``; ``finish_s`` in the order of the trace.
    """
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]), record=True)
    row = np.zeros(1, dtype=np.int64)
    batch.reset(row, row, np.array([member]))
    batch.params["drain"] = 1
    clocks, st = plant.clocks, batch.states[0]
    action = np.zeros(1, dtype=np.float32)
    while not batch.done[0]:
        action[:] = clocks.to_action(decisions.at(float(st["time_s"]) + LATENESS_S))
        batch.step(action)
    return batch.finish_s, float(st["energy_j"]), float(st["time_s"])


def plant_of(raw: Raw, phase: str) -> Plant:
    """Plant of a replay: its instance, with the measured actuation delay where there is one.

    A power limit can be read back, but not when it takes effect: there the expected delay stands.
    """
    delays, settings = delays_s(raw, phase), raw.facts["settings"]
    means = settings.get("means", "lock")
    measured = len(delays) > 0 and means == "lock"
    return Plant(
        PlantSettings.of(
            phase,
            instance=raw.instance,
            actuation_delay_s=float(np.median(delays)) if measured else settings["delay_s"],
            drain=True,
            means=means,
        )
    )


def load_of(requests: Mapping[str, Column]) -> NDArray[np.bool_]:
    """Requests that were load for the engine: not those that it refused without a single token."""
    return np.asarray(requests["answered"] | ~requests["failed"], dtype=np.bool_)


def simulated_record(raw: Raw, measured: RunRecord) -> RunRecord:
    """The simulated twin of a measured run record.

    The simulated engine gets each request when the real one got it, while latencies count from the
    trace in both. A request that failed is failed in both.

    Raises:
        BiscaleError: no decision was recorded.
    """
    phase, taken = measured.phase, raw.decisions[measured.phase]
    if not taken:
        raise BiscaleError(
            f"no decision was recorded for {phase}: "
            "the engine's records never reached the controller"
        )
    plant = plant_of(raw, phase)
    times = np.array([d.time_s for d in taken]) - raw.start_s
    policy = RecordedPolicy(times, np.array([d.freq_mhz for d in taken]), plant.clocks)
    columns = measured.requests
    rows = np.flatnonzero(load_of(columns))
    rows = rows[np.argsort(columns["sent_s"][rows], kind="stable")]
    sent_s = np.maximum(columns["sent_s"][rows], 0.0)
    prompt, output = (columns[name][rows].astype(np.int32) for name in TOKEN_COLUMNS)
    trace = Trace("measured", sent_s, prompt, output, "replay")
    finish = np.full(len(columns["sent_s"]), np.nan)
    finish[rows], energy_j, duration_s = simulate(plant, trace, policy)
    finish[columns["failed"]] = np.nan
    first = finish if phase == "prefill" else columns["first_token_s"]
    return dataclasses.replace(
        measured,
        n_gpus=plant.settings.tp,
        requests={**columns, "first_token_s": first, "finish_s": finish},
        timeline={name: np.zeros(0) for name in measured.timeline},
        totals={"energy_j": energy_j, "duration_s": duration_s},
        labels={"source": "simulation"},
    )


def compare(raw: Raw, top_mhz: float | None = None) -> list[Agreement]:
    """Measured against simulated, for every controlled phase.

    Args:
        raw: logs of the replay.
        top_mhz: clock under the driver's own control; None: the highest of the instance's GPU.
    """
    found = []
    for phase in raw.phases:
        measured = run_record(raw, phase, top_mhz or plant_of(raw, phase).gpu.freq_max_mhz)
        real, twin = results_row(measured), results_row(simulated_record(raw, measured))
        for name in QUANTITIES[phase]:
            tolerance = TOLERANCES["p99"] if "p99" in name else TOLERANCES.get(name, math.nan)
            found.append(Agreement(phase, name, float(real[name]), float(twin[name]), tolerance))
    return found
