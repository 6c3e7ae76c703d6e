"""Raw logs of a replay on a deployment, and each instance of it as a replay of its own.

The files are those of :mod:`biscale_env.hardware.replay.raw_log`, with instances where that has
phases, and ``routes.jsonl``, what the router did with each request.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import yaml

from biscale_env.config.loader import validate
from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.deploy.deployment_file import Deployment
from biscale_env.hardware.deploy.feed_log import PLACEMENTS
from biscale_env.hardware.deploy.machine_feed import PlacementEvent
from biscale_env.hardware.deploy.router_http import Route
from biscale_env.hardware.loop.control import Decision
from biscale_env.hardware.loop.wire import ClockChange
from biscale_env.hardware.replay import raw_log
from biscale_env.hardware.replay.client import RequestRecord
from biscale_env.hardware.replay.raw_log import Raw, read_lines
from biscale_env.hardware.replay.recorder import IterationRow

ROUTES = "routes.jsonl"


def is_deployed(folder: Path) -> bool:
    """Whether a raw folder is that of a replay on a deployment."""
    try:
        facts = yaml.safe_load((folder / raw_log.FACTS).read_text(encoding="utf-8"))
        return "deployment" in facts["settings"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False


@dataclass(frozen=True)
class DeployedRaw:
    """Raw logs; all times CLOCK_MONOTONIC of the machine that replayed.

    Attributes:
        facts: settings, trace, start and end.
        deployment: what was deployed.
        requests: as the client saw them, in the order of the trace.
        routes: what the router did, by the request's index; empty for somebody else's router.
        iterations: engine records by instance.
        decisions: by instance.
        changes: clock changes of all instances.
        telemetry: samples of all GPUs.
        placements: of tier 1, in the order of time; none without.
    """

    facts: dict[str, Any]
    deployment: Deployment
    requests: list[RequestRecord]
    routes: dict[int, Route]
    iterations: dict[str, list[IterationRow]]
    decisions: dict[str, list[Decision]]
    changes: list[ClockChange]
    telemetry: pd.DataFrame
    placements: list[PlacementEvent] = field(default_factory=list)

    @property
    def start_s(self) -> float:
        """Time 0 of the trace."""
        return float(self.facts["started_s"])

    @property
    def router_known(self) -> bool:
        """Whether it is known which instances served a request."""
        return self.deployment.router.kind == "biscale"

    @cached_property
    def _routed(self) -> list[tuple[RequestRecord, Route | None]]:
        """Requests with what the router saw of them written in."""
        pairs = []
        for request in self.requests:
            route = self.routes.get(request.index)
            if route is not None:
                decoded = route.prefill_done_s if route.decode else math.nan
                request = msgspec.structs.replace(
                    request, prefill_done_s=route.prefill_done_s, decode_sent_s=decoded
                )
            pairs.append((request, route))
        return pairs

    def in_service(self, name: str, until_s: float) -> list[tuple[float, float]]:
        """When an instance was in service: open, or with requests that it still had.

        Args:
            name: the instance.
            until_s: end of what is asked for, s from the start of the trace.

        Returns:
            Spans (begin, end), s from the start of the trace; the whole time without tier 1.
        """
        spans: list[tuple[float, float]] = []
        phase, open_s = self.deployment.instances[name].phase, 0.0
        closed = False
        for event in self.placements:
            at_s = event.time_s - self.start_s
            if closed and name in event.open:
                open_s, closed = max(at_s, 0.0), False
            elif not closed and name not in event.open:
                spans.append((open_s, max(at_s, 0.0)))
                closed = True
        if not closed:
            spans.append((open_s, until_s))
        busy = [span for r, route in self._routed if (span := self._busy(r, route, name, phase))]
        return _merged([*spans, *busy], until_s)

    def _busy(
        self, request: RequestRecord, route: Route | None, name: str, phase: str
    ) -> tuple[float, float] | None:
        """When an instance had a request, s from the start; None: never."""
        if route is None or getattr(route, phase) != name:
            return None
        begin = route.arrived_s if phase == "prefill" else route.prefill_done_s
        end = route.prefill_done_s if phase == "prefill" else request.last_chunk_s
        if not math.isfinite(end - begin):
            return None
        return begin - self.start_s, end - self.start_s

    def of_instance(self, name: str, unrouted: bool = False) -> Raw:
        """One instance as if it had been replayed alone.

        Args:
            name: the instance.
            unrouted: with the requests that failed before they got to an instance of its phase;
                behind somebody else's router with all requests, since their instance is not known.
        """
        phase, known = self.deployment.instances[name].phase, self.router_known

        def here(route: Route | None) -> bool:
            where = "" if route is None else getattr(route, phase)
            return where == name or (not where and unrouted)

        pairs = self._routed
        requests = [r for r, route in pairs if here(route) and (r.failed or route or not known)]
        facts = {
            **self.facts,
            "settings": {
                "policies": {phase: self.deployment.policy(name)},
                "prefill_url": self.deployment.router.url if known else None,
                "engine": self.facts["settings"]["engine"],
                "delay_s": self.facts["settings"]["delay_s"],
                "means": self.deployment.bounds.means,
                "instance": self.deployment.spec(name).model_dump(mode="json"),
            },
        }
        changes = [msgspec.structs.replace(c, group=phase) for c in self.changes if c.group == name]
        telemetry = self.telemetry[self.telemetry["group"] == name].assign(group=phase)
        rows = [msgspec.structs.replace(r, phase=phase) for r in self.iterations.get(name, [])]
        decisions = self.decisions.get(name, [])
        return Raw(facts, requests, {phase: rows}, {phase: decisions}, changes, telemetry)


def read_deployed(folder: Path) -> DeployedRaw:
    """Read the logs.

    Raises:
        BiscaleError: this is not the raw folder of a replay on a deployment.
    """
    try:
        facts = yaml.safe_load((folder / raw_log.FACTS).read_text(encoding="utf-8"))
        telemetry = pd.read_parquet(folder / raw_log.TELEMETRY)
        described = facts["settings"]["deployment"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise BiscaleError(
            f"{folder} holds no replay on a deployment: give the folder that `biscale replay "
            "--deployment --out` wrote"
        ) from None
    deployment = validate(described, Deployment, str(folder / raw_log.FACTS))
    rows = read_lines(folder / raw_log.ITERATIONS, IterationRow)
    routes = read_lines(folder / ROUTES, Route)
    names = list(deployment.instances)
    requests = read_lines(folder / raw_log.REQUESTS, RequestRecord)
    return DeployedRaw(
        facts,
        deployment,
        sorted(requests, key=lambda r: r.index),
        {int(route.request.rpartition("-")[2]): route for route in routes},
        {name: [r for r in rows if r.phase == name] for name in names},
        {name: read_lines(folder / raw_log.decisions_file(name), Decision) for name in names},
        read_lines(folder / raw_log.CLOCKS, ClockChange),
        telemetry,
        read_lines(folder / PLACEMENTS, PlacementEvent),
    )


def _merged(spans: list[tuple[float, float]], until_s: float) -> list[tuple[float, float]]:
    """Spans of time without overlaps, within 0 and ``until_s``."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted((max(a, 0.0), min(b, until_s)) for a, b in spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        elif end > begin:
            merged.append((begin, end))
    return merged
