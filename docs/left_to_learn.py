"""What a prefill agent leaves to be learned: one step of policy improvement over it, measured.

At each operating point of the experiment `foresight` the agent stands at the price that holds the
SLO at least energy on the judged workload; `controllers.oracle.improvement` then tries every clock
at every decision, on futures drawn from the tuning workloads, at the same price.

Usage: python docs/update.py left-to-learn=POLICY (about ten minutes)
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd

from agents.policy.numpy_policy import NumpyPolicy, load_network
from biscale_env.core.markdown import markdown_table
from biscale_env.envs.loads.capacity import run_static
from biscale_env.evaluation.experiment.experiments import load_experiment
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.evaluation.rollouts.scenarios import Case, load_scenario, resolve
from biscale_env.traces import Trace
from controllers.oracle.improvement import Improver, run_improved
from controllers.oracle.sampled_futures import SampledFutures

PRICES = np.geomspace(0.5, 500.0, 13)
TUNING_WORKLOADS, REQUESTS_AHEAD, HORIZON_S = 4, 2.0, (3.0, 12.0)
WINDOW_S = 900.0  # of the judged workload, so that a point takes minutes


@dataclass(frozen=True)
class Point:
    """One operating point.

    Attributes:
        point: its name.
        target: attainment, the SLO's or max clock's if that is less.
        price: of the agent.
        energy, attained: the agent's, energy relative to max clock.
        improved_energy, improved_attained: after one step of improvement.
        gain: how much less energy and priced late requests are, relative to max clock's energy.
        changed: share of decisions.
    """

    point: str
    target: float
    price: float
    energy: float
    attained: float
    improved_energy: float
    improved_attained: float
    gain: float
    changed: float


def _case(workload: str, load: float, delay_s: float) -> Case:
    scenario = load_scenario(workload).model_copy(update={"load": load, "delay_s": delay_s})
    return resolve(scenario, "prefill")


def measure(checkpoint: str, workload: str, load: float, delay_s: float) -> Point:
    """The agent and one step of improvement over it at one operating point."""
    case, network = _case(workload, load, delay_s), load_network(Path(checkpoint))
    plant, whole = case.plant, case.workload(0)
    trace = whole.window(0.0, min(WINDOW_S, whole.duration_s))
    top = run_static(plant, trace, plant.clocks.freq_max_mhz)
    bound_s, n = plant.slo.bound_s("prefill"), len(trace)
    target = min(plant.slo.attainment, float((top.latency_s <= bound_s).mean()))
    found = []
    for price in PRICES:
        agent = NumpyPolicy(network, plant, price=float(price))
        energy_j, late = _run(agent, case, trace)
        found.append((1.0 - late / n < target - 1e-9, energy_j, late, float(price), agent))
    missed, energy_j, late, price, agent = min(
        found, key=lambda one: (one[0], one[2] if one[0] else one[1], one[1])
    )
    horizon_s = float(np.clip(REQUESTS_AHEAD / trace.rate_rps, *HORIZON_S))
    known = [case.tuning_workload(k) for k in range(TUNING_WORKLOADS)]
    late_j = price * top.energy_j / n
    improver = Improver(plant, agent, SampledFutures(known, horizon_s), late_j)
    done = run_improved(improver, trace)
    gain_j = energy_j + late_j * late - done.energy_j - late_j * done.violations
    return Point(
        f"{workload}, {100 * load:.0f} %",
        target,
        price,
        energy_j / top.energy_j,
        1.0 - late / n,
        done.energy_j / top.energy_j,
        done.attainment,
        gain_j / top.energy_j,
        improver.changed / improver.decisions,
    )


def _run(agent: NumpyPolicy, case: Case, trace: Trace) -> tuple[float, float]:
    """Energy, J, and late requests."""
    (run,) = rollout(agent, case.plant, [trace], time_probe=False, keep_steps=False)
    return run.totals["energy_j"], run.totals["n_violations"]


def measure_all(checkpoint: str, jobs: int = 2) -> pd.DataFrame:
    """Every operating point of the experiment, a row each."""
    e = load_experiment("foresight")
    points = [(w, load, delay) for w in e.workloads for load in e.loads for delay in e.delays_s]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(measure, checkpoint, *point) for point in points]
        return pd.DataFrame([asdict(one.result()) for one in waiting])


def markdown(table: pd.DataFrame) -> str:
    """The rows in the order of energy saved; struck through where the SLO is missed."""
    heads: Sequence[str] = (
        "operating point",
        "price",
        "agent",
        "improved once",
        "objective, points",
        "decisions changed",
    )
    rows = []
    for r in table.sort_values("point").itertuples():
        rows.append(
            (
                str(r.point),
                f"{r.price:.3g}",
                _cell(r.energy, r.attained, r.target),
                _cell(r.improved_energy, r.improved_attained, r.target),
                f"{-100 * r.gain:+.2f}",
                f"{100 * r.changed:.0f} %",
            )
        )
    return markdown_table(heads, rows, "lr")


def _cell(energy: float, attained: float, target: float) -> str:
    text = f"{energy:.3f} ({100 * attained:.2f})"
    return text if attained >= target - 1e-9 else f"~~{text}~~"
