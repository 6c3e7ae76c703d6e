"""How far a deployment and the simulator are apart.

Twice. Every instance beside its twin, which gets the same requests at the same times and takes the
same decisions; and the whole beside the cluster simulator, which routes and decides for itself.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.config import load_slo
from biscale_env.config.cluster_layout import InstanceGroup, Placement
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_settings import ClusterPlant
from biscale_env.envs.cluster.engine import Cluster, Energies
from biscale_env.envs.cluster.instance_observer import ClusterObserver
from biscale_env.envs.cluster.whole_run import advance_with
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.deploy.deployed_cluster import cluster_settings
from biscale_env.hardware.deploy.deployed_raw import DeployedRaw
from biscale_env.hardware.deploy.machine_feed import PlacementEvent, PlannedInstance
from biscale_env.hardware.deploy.pool_record import end_s, energy_j, instance_records, top_mhz
from biscale_env.hardware.loop.recorded_policy import BASE, load_policy
from biscale_env.hardware.replay.assemble import delays_s
from biscale_env.hardware.replay.validate import TOLERANCES, Agreement, compare
from biscale_env.traces import Trace

PHASES: Final = ("prefill", "decode")
CLUSTER = "cluster"
Floats = NDArray[np.float64]
QUANTILES = (0.5, 0.9, 0.99)


def compare_deployed(raw: DeployedRaw) -> list[Agreement]:
    """Every instance against its twin, then the whole against the cluster simulator.

    Raises:
        BiscaleError: the router was not ours, or the deployment is of a kind that the cluster
            simulator does not know.
    """
    if not raw.router_known:
        raise BiscaleError(
            f"the router of {raw.deployment.name} was not ours: which instance served which "
            "request is not known, so there is nothing to simulate"
        )
    found: list[Agreement] = []
    for phase in PHASES:
        for name in instance_records(raw, phase):
            rows = compare(raw.of_instance(name), top_mhz(raw, name))
            found += [
                Agreement(name, r.quantity, r.measured, r.simulated, r.tolerance) for r in rows
            ]
    return found + compare_with_cluster(raw)


def cluster_of(raw: DeployedRaw) -> ClusterPlant:
    """The same cluster for the simulator, with the delay that was measured.

    Raises:
        BiscaleError: instances of several kinds.
    """
    d = raw.deployment
    measured = [delays_s(raw.of_instance(name), d.instances[name].phase) for name in d.instances]
    delays = np.concatenate(measured)
    rules = {f"{p}_policy": "static" if _policy(raw, p) == BASE else "external" for p in PHASES}
    return ClusterPlant(
        cluster_settings(d).changed(
            actuation_delay_s=float(np.median(delays)) if len(delays) else d.bounds.delay_s,
            spare="off",
            **rules,
        )
    )


def _policy(raw: DeployedRaw, phase: str) -> str:
    return raw.deployment.policy(raw.deployment.of_phase(phase)[0])


def placement_of(raw: DeployedRaw, event: PlacementEvent | None) -> Placement:
    """A placement of tier 1 for the simulator; None: all instances at the highest clock."""
    d = raw.deployment
    groups = []
    for phase in PHASES:
        for name in d.of_phase(phase):
            tp = len(d.instances[name].gpus)
            planned = PlannedInstance(top_mhz(raw, name), float(tp))
            if event is not None:
                if name not in event.open:
                    continue
                planned = event.open[name]
            groups.append(
                InstanceGroup(phase=phase, tp=tp, freq_mhz=planned.freq_mhz, weight=planned.weight)
            )
    return Placement(name=d.name, groups=tuple(groups))


def simulate_cluster(
    raw: DeployedRaw, arrivals: Trace, until_s: float
) -> tuple[NDArray[np.void], Energies]:
    """Run the cluster simulator on the measured arrivals, with the policies that were deployed.

    Returns:
        Requests in the order of their arrival, and the energies up to ``until_s``.
    """
    d = raw.deployment
    plant = cluster_of(raw)
    policies = {}
    for phase in PHASES:
        if _policy(raw, phase) == BASE:
            continue
        name = d.of_phase(phase)[0]
        settings = PlantSettings.of(
            phase,
            instance=d.spec(name),
            actuation_delay_s=plant.settings.actuation_delay_s,
            drain=True,
        )
        policies[phase] = load_policy(d.policy(name), Plant(settings))
    early = [e for e in raw.placements if e.time_s <= raw.start_s]
    cluster = Cluster(plant, placement_of(raw, early[-1] if early else None))
    observer = ClusterObserver(cluster)
    cluster.offer(arrivals)
    logs = []
    for event in raw.placements[len(early) :]:
        logs += advance_with(cluster, observer, policies, min(event.time_s - raw.start_s, until_s))
        cluster.place(placement_of(raw, event))
    logs += advance_with(cluster, observer, policies, until_s)
    energies = cluster.energies()
    logs += advance_with(cluster, observer, policies)
    requests = np.concatenate(logs)
    return requests[np.argsort(requests["request"], kind="stable")], energies


def compare_with_cluster(raw: DeployedRaw) -> list[Agreement]:
    """Energy and latencies of both pools, measured and simulated.

    TTFT counts from the times of the trace to the end of prefill, TPOT from there to the last
    token, in both. Only requests that were answered in full are load for the simulator.

    Raises:
        BiscaleError: policies differ within a phase.
    """
    d = raw.deployment
    if d.bounds.means == "cap":
        raise BiscaleError(
            f"{d.name} holds clocks by power limits, which the cluster simulator does not know: "
            "there is nothing to compare the whole with"
        )
    for phase in PHASES:
        if len({d.policy(name) for name in d.of_phase(phase)}) > 1:
            raise BiscaleError(
                f"the {phase} instances have different policies: the cluster simulator has one "
                "per phase"
            )
    done = [(r, raw.routes[r.index]) for r in raw.requests if not r.failed]
    done.sort(key=lambda pair: pair[1].arrived_s)
    arrived = np.array([route.arrived_s for _, route in done]) - raw.start_s
    waited = np.array([route.arrived_s - r.scheduled_s for r, route in done])
    outputs = np.array([r.output_tokens for r, _ in done], dtype=np.int32)
    arrivals = Trace(
        "measured",
        np.maximum(arrived, 0.0),
        np.array([r.prompt_tokens for r, _ in done], dtype=np.int32),
        outputs,
        "replay",
    )
    until_s = max(end_s(instance_records(raw, phase)) for phase in PHASES)
    simulated, energies = simulate_cluster(raw, arrivals, until_s)
    first = np.array([route.prefill_done_s for _, route in done])
    last = np.array([r.last_chunk_s for r, _ in done])
    pairs = {
        "ttft": (
            first - raw.start_s - arrived + waited,
            simulated["first_token_s"] - simulated["arrival_s"] + waited,
        ),
        "tpot": (
            _per_token(last - first, outputs),
            _per_token(simulated["finish_s"] - simulated["first_token_s"], outputs),
        ),
    }
    slo, rows = load_slo(d.instance.slo), []
    joules = {"prefill": energies.prefill_j, "decode": energies.decode_j}
    for phase, metric in zip(PHASES, pairs, strict=True):
        where = f"{CLUSTER} {phase}"
        real, twin = pairs[metric]
        for q in QUANTILES:
            tolerance = TOLERANCES["p99"] if q == QUANTILES[-1] else math.nan
            a, b = float(np.quantile(real, q)), float(np.quantile(twin, q))
            rows.append(Agreement(where, f"{metric}_p{100 * q:.0f}_s", a, b, tolerance))
        met = slo.attained(real, phase), slo.attained(twin, phase)
        rows.append(Agreement(where, "attainment", *met))
        measured_j = sum(energy_j(raw, name, until_s) for name in d.of_phase(phase))
        rows.append(Agreement(where, "energy_j", measured_j, joules[phase], TOLERANCES["energy_j"]))
    return rows


def _per_token(spans_s: Floats, outputs: NDArray[np.int32]) -> Floats:
    """TPOT of the requests of two tokens or more, s."""
    many = outputs > 1
    return np.asarray(spans_s[many] / (outputs[many] - 1))
