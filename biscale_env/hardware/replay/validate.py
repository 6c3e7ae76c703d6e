"""How far simulation and reality are apart: the same requests, the same decisions, simulated.

Side by side.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.runs.record import RunRecord
from biscale_env.evaluation.stats.metrics import results_row
from biscale_env.hardware.loop.recorded_policy import RecordedPolicy
from biscale_env.hardware.replay.assemble import Raw, delays_s, run_record
from biscale_env.traces import Trace

LATENESS_S = (
    0.005  # a simulated iteration may begin this much before the real one whose decision it takes
)
TOLERANCES = {"energy_j": 0.02, "p99": 0.05}
QUANTITIES = {
    "prefill": (
        "ttft_p50_s",
        "ttft_p90_s",
        "ttft_p99_s",
        "attainment",
        "energy_j",
        "mean_power_w",
        "duration_s",
    ),
    "decode": (
        "tpot_p50_s",
        "tpot_p90_s",
        "tpot_p99_s",
        "attainment",
        "energy_j",
        "mean_power_w",
        "duration_s",
    ),
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
        """Whether it lies within the tolerance; True where none is asked for."""
        return math.isnan(self.tolerance) or abs(self.deviation) <= self.tolerance


def simulate(
    plant: Plant, trace: Trace, decisions: RecordedPolicy, member: int = -1
) -> tuple[dict[str, NDArray[np.float64]], float, float]:
    """Run the simulator on measured arrivals under recorded decisions.

    Args:
        plant: with the measured actuation delay.
        trace: arrivals as measured at this phase.
        decisions: clock decided at the engine's times of the records.
        member: ensemble member.

    Returns:
        ``(requests, energy in J, duration in s)``; requests have ``arrival_s`` and ``finish_s`` in
        the order of the trace.
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
    requests = {"arrival_s": batch.pool.arrival_s, "finish_s": batch.finish_s}
    return requests, float(st["energy_j"]), float(st["time_s"])


def simulated_record(raw: Raw, measured: RunRecord) -> RunRecord:
    """The simulated twin of a measured run record.

    Raises:
        BiscaleError: no decision was recorded.
    """
    phase, settings = measured.phase, raw.facts["settings"]
    taken = raw.decisions[phase]
    if not taken:
        raise BiscaleError(
            f"no decision was recorded for {phase}: the engine's records never reached the controller"
        )
    delays = delays_s(raw, phase)
    plant = Plant(
        PlantSettings.of(
            phase, model=settings["model"], tp=settings["tp"], dtype=settings["dtype"], slo=settings["slo"], drain=True,
            token_budget=settings["token_budget"], max_seqs=settings["max_seqs"],
            actuation_delay_s=float(np.median(delays)) if len(delays) else settings["delay_s"],
        )
    )  # fmt: skip
    times = np.array([d.time_s for d in taken]) - raw.start_s
    policy = RecordedPolicy(times, np.array([d.freq_mhz for d in taken]), plant.clocks)
    kept = np.isfinite(measured.requests["arrival_s"])
    columns = {name: values[kept] for name, values in measured.requests.items()}
    arrival = np.maximum.accumulate(np.maximum(columns["arrival_s"], 0.0))
    trace = Trace(
        "measured",
        arrival,
        columns["prompt_tokens"].astype(np.int32),
        columns["output_tokens"].astype(np.int32),
        "replay",
    )
    requests, energy_j, duration_s = simulate(plant, trace, policy)
    finish = requests["finish_s"]
    mine = {
        **columns, "arrival_s": arrival, "first_token_s": finish if phase == "prefill" else arrival, "finish_s": finish,
    }  # fmt: skip
    return RunRecord(
        phase=phase, policy=measured.policy, scenario=measured.scenario, slo=measured.slo, rate_rps=measured.rate_rps, workload_seed=0,
        ensemble_member=-1, tp=measured.tp, dtype=measured.dtype, n_gpus=plant.settings.tp, requests=mine,
        timeline={name: np.zeros(0) for name in measured.timeline}, totals={"energy_j": energy_j, "duration_s": duration_s},
        labels={"source": "simulation"},
    )  # fmt: skip


def compare(raw: Raw, top_mhz: float) -> list[Agreement]:
    """Measured against simulated, for every controlled phase."""
    found = []
    for phase in raw.phases:
        measured = run_record(raw, phase, top_mhz)
        real, twin = results_row(measured), results_row(simulated_record(raw, measured))
        for name in QUANTITIES[phase]:
            tolerance = TOLERANCES["p99"] if "p99" in name else TOLERANCES.get(name, math.nan)
            found.append(Agreement(phase, name, float(real[name]), float(twin[name]), tolerance))
    return found
