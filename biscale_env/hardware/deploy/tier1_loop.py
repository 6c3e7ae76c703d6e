"""Tier 1 in the loop: every window the placement programme, on the load of the window before.

Base clocks go to the controllers at once. The router is told which instances are open; what it
closes drains. Counts go to an adapter when what is surplus is empty.
"""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import zmq

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_settings import ClusterPlant
from biscale_env.hardware.deploy.deployed_cluster import cluster_settings
from biscale_env.hardware.deploy.deployment_file import Deployment, Tier1Settings
from biscale_env.hardware.deploy.live_status import ask_router, read_json_lines
from biscale_env.hardware.deploy.machine_feed import PlacementEvent, PlannedInstance
from biscale_env.hardware.deploy.router_http import ARRIVALS, SeenRequest, placement_endpoint
from biscale_env.hardware.deploy.scaling import Scaler, scaler_of
from biscale_env.hardware.loop import wire
from biscale_env.traces import Trace, generate
from controllers.placement.capacity_table import MIN_REQUESTS, TableRequest, capacity_table
from controllers.placement.ilp import CapacityTable, NoPlacementError, biscale_plan

PHASES = ("prefill", "decode")
SAMPLE_RPS, SAMPLE_S, SAMPLE_SEED = 10.0, 600.0, 1_000_003  # of the first table, as of a day's
CHOICES, TOLERANCE = (0,), 0.02  # of a window's table, as in `biscale reproduce paper`
TURN_S = 0.2
DRAIN_S = 600.0  # how long an instance may take to become empty before its count is set anyway


class WindowPlanner:
    """Solves the programme over the instances that a deployment has."""

    def __init__(self, deployment: Deployment) -> None:
        """Count instances; the first table is made of a generated workload when it is needed.

        Raises:
            BiscaleError: there is no section ``tier1``, or the router is not ours.
        """
        if deployment.tier1 is None:
            raise BiscaleError(f"{deployment.name} has no section 'tier1'")
        if deployment.router.kind != "biscale":
            raise BiscaleError(
                "tier 1 observes the load at our router: router.kind must be biscale"
            )
        self.deployment, self.settings = deployment, deployment.tier1
        self.cluster = cluster_settings(deployment)
        self.there: dict[tuple[str, int], list[str]] = {}
        for name, one in deployment.instances.items():
            self.there.setdefault((one.phase, len(one.gpus)), []).append(name)
        self.table: CapacityTable | None = None

    def everything(self) -> dict[str, PlannedInstance]:
        """All instances open at the highest clock."""
        plants = ClusterPlant(self.cluster)
        found: dict[str, PlannedInstance] = {}
        for (phase, tp), names in self.there.items():
            top_mhz = plants.plant(phase, tp).gpu.freq_max_mhz
            found |= {name: PlannedInstance(top_mhz, float(tp)) for name in names}
        return found

    def observe(self, window: Trace) -> None:
        """Measure capacities on the requests of a window; too few leave the table as it is."""
        if self.table is not None and len(window) < MIN_REQUESTS:
            return
        if len(window) < MIN_REQUESTS:
            window = generate(
                "azure-conv-like", rate_rps=SAMPLE_RPS, duration_s=SAMPLE_S, seed=SAMPLE_SEED
            )
        request = TableRequest(self.cluster, (), CHOICES, TOLERANCE)
        table = capacity_table(request, window)
        entries = tuple(e for e in table.entries if (e.phase, e.tp) in self.there)
        self.table = CapacityTable(entries, table.slo, table.workload)

    def plan(self, rate_rps: float) -> tuple[dict[str, PlannedInstance], str]:
        """Open instances for a load, and the placement in words.

        Where no placement serves it with the headroom, all are open at the highest clock. Of equal
        instances the first of the file are open.
        """
        assert self.table is not None
        at_most = {kind: len(names) for kind, names in self.there.items()}
        try:
            plan = biscale_plan(
                self.table, rate_rps, self.cluster.gpus, self.settings.alpha, at_most=at_most
            )
        except NoPlacementError as error:
            return self.everything(), f"all instances at the highest clock: {error}"
        left = {kind: list(names) for kind, names in self.there.items()}
        found = {}
        for group in plan.placement.groups:
            for _ in range(group.count):
                name = left[group.phase, group.tp].pop(0)
                found[name] = PlannedInstance(group.freq_mhz, group.weight)
        return found, plan.placement.label()


def window_of(arrivals: list[SeenRequest], start_s: float, end_s: float) -> Trace:
    """Requests that arrived within a window, as a trace from its start."""
    kept = sorted(
        (a for a in arrivals if start_s <= a.time_s < end_s), key=lambda arrival: arrival.time_s
    )
    return Trace(
        "window",
        np.array([a.time_s - start_s for a in kept], dtype=np.float64),
        np.array([a.prompt_tokens for a in kept], dtype=np.int32),
        np.array([max(a.output_tokens, 1) for a in kept], dtype=np.int32),
        "observed",
        duration_s=end_s - start_s,
    )


class Tier1Loop:
    """Plans, tells, drains, scales."""

    def __init__(
        self,
        deployment: Deployment,
        sockets: Path,
        log: IO[bytes] | None = None,
        scaler: Scaler | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        """Open the sockets.

        Args:
            deployment: with a section ``tier1``.
            sockets: socket folder of this machine, from which its agent passes plans on.
            log: JSON lines of placements.
            scaler: carries counts out; None: the one that the settings name.
            tell: called with sentences.

        Raises:
            BiscaleError: see :class:`WindowPlanner`.
        """
        self.planner = WindowPlanner(deployment)
        self.deployment, self.log, self._tell = deployment, log, tell
        self.settings: Tier1Settings = self.planner.settings
        self.scaler = scaler or scaler_of(self.settings)
        self._context = zmq.Context()
        self._endpoint = wire.plans_endpoint(sockets)
        self._plans = wire.publisher(self._context, self._endpoint)
        self._router = wire.newest_sender(self._context, placement_endpoint(deployment))
        self._begun_s = time.monotonic()
        self._next_s = self._begun_s
        self._draining: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self.current: PlacementEvent | None = None

    def turn(self) -> None:
        """Plan when a window ends, tell the current placement again, look at what drains."""
        now = time.monotonic()
        if now >= self._next_s:
            first = self.current is None
            self._plan(now, first)
            while self._next_s <= time.monotonic():  # a plan that took long shifts no window
                self._next_s += self.settings.window_s
            if first and self.current is not None:
                self._publish(self.current)
                self.planner.observe(window_of([], now, now + 1.0))  # so that the next is quick
        if self.current is not None:
            self._publish(self.current)
        self._drain(time.monotonic())

    def _plan(self, now_s: float, first: bool) -> None:
        start_s = max(now_s - self.settings.window_s, self._begun_s)
        window = window_of([] if first else ask_arrivals(self.deployment, start_s), start_s, now_s)
        rate_rps = (self.settings.rate_rps or 0.0) if first else window.rate_rps
        if rate_rps > 0:
            self.planner.observe(window)
            chosen, label = self.planner.plan(rate_rps)
        elif self.current is None:
            chosen, label = self.planner.everything(), "all instances: no load is known yet"
        else:
            return  # a window without requests changes nothing
        before = set(self.current.open) if self.current else set(self.deployment.instances)
        event = PlacementEvent(
            time.monotonic(), rate_rps or math.nan, chosen, label, time.monotonic() - now_s
        )
        self.current = event
        self._tell(f"{rate_rps:.2f} requests/s: {label}")
        if self.log is not None:
            self.log.write(msgspec.json.encode(event) + b"\n")
            self.log.flush()
        for name in sorted(before - set(chosen)):
            self._draining[name] = event.time_s
        for name in chosen:
            self._draining.pop(name, None)
        self._grow()

    def _publish(self, event: PlacementEvent) -> None:
        self._plans.send(msgspec.msgpack.encode(event), zmq.NOBLOCK)
        if self.settings.adapter == "advise":
            return
        weights = {name: one.weight for name, one in event.open.items()}
        with contextlib.suppress(zmq.Again):
            self._router.send(msgspec.json.encode(weights), zmq.NOBLOCK)

    def _grow(self) -> None:
        """Counts that rise are set at once; those that fall wait for the drain."""
        for phase in PHASES:
            wanted = self._wanted(phase)
            known = self._counts.get(phase, len(self.deployment.of_phase(phase)))
            if self.settings.adapter == "advise" or wanted > known:
                self._scale(phase, wanted)

    def _wanted(self, phase: str) -> int:
        assert self.current is not None
        return sum(self.deployment.instances[name].phase == phase for name in self.current.open)

    def _drain(self, now_s: float) -> None:
        if not self._draining or self.settings.adapter == "advise":
            self._draining.clear()
            return
        state = ask_router(self.deployment)
        if state is None:
            return
        for name, since_s in list(self._draining.items()):
            load = state.instances.get(name)
            late = now_s - since_s > DRAIN_S
            if load is None or load.open or (load.requests and not late):
                continue
            del self._draining[name]
            how = "is given up" if load.requests else "is empty"
            self._tell(f"{name} {how} after {now_s - since_s:.1f} s")
            phase = self.deployment.instances[name].phase
            if not any(self.deployment.instances[n].phase == phase for n in self._draining):
                self._scale(phase, self._wanted(phase))

    def _scale(self, phase: str, count: int) -> None:
        if self._counts.get(phase) == count:
            return
        try:
            self._tell(self.scaler.scale(phase, count))
            self._counts[phase] = count
        except BiscaleError as error:
            self._tell(str(error))

    def close(self) -> None:
        """Close the sockets."""
        self._context.destroy(0)
        wire.unbind(self._endpoint)


def ask_arrivals(deployment: Deployment, since_s: float) -> list[SeenRequest]:
    """Requests that our router has had since a time; empty where it does not answer."""
    path = f"{ARRIVALS}?after={since_s!r}"
    return read_json_lines(deployment.router.url, path, SeenRequest)
