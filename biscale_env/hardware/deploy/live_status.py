"""`biscale hw status`: a deployment, live in the terminal."""

import math
import time
import urllib.request
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from biscale_env.hardware.deploy.deployment_file import Deployment
from biscale_env.hardware.deploy.machine_feed import STATE, FeedReader, InstanceState, MachineState
from biscale_env.hardware.deploy.router_http import STATE as ROUTER_STATE
from biscale_env.hardware.deploy.router_http import RouterState

T = TypeVar("T")
SILENT_AFTER_S = 3.0
LOOK_S = 2.0  # between two tables: drawing one costs some 10 ms of a core
ROUTER_TIMEOUT_S = 0.5
COLUMNS = (
    "instance",
    "machine",
    "policy",
    "set",
    "seen",
    "power",
    "energy",
    "lease",
    "iter/s",
    "batch",
    "queue",
    "KV",
    "routed",
)


@dataclass
class StatusBoard:
    """What is known of a deployment.

    Attributes:
        deployment: which.
        reader: its feeds.
        states: newest state per machine.
        heard_s: when it came.
        router: what our router tells; None: not ours, or it does not answer.
    """

    deployment: Deployment
    reader: FeedReader
    states: dict[str, MachineState] = field(default_factory=dict)
    heard_s: dict[str, float] = field(default_factory=dict)
    router: RouterState | None = None

    @classmethod
    def of(cls, deployment: Deployment, at: str | None = None) -> "StatusBoard":
        """Follow the states of all machines; ``at`` names the machine whose keys are used."""
        return cls(deployment, FeedReader(deployment, at, (STATE,)))

    def look(self, seconds: float) -> None:
        """Take in what comes within some seconds, then ask the router."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for machine, _, state in self.reader.messages(left):
                self.states[machine], self.heard_s[machine] = state, time.monotonic()
        if self.deployment.router.kind == "biscale":
            self.router = ask_router(self.deployment)

    def silent(self) -> list[str]:
        """Machines that have not told anything lately."""
        now = time.monotonic()
        return [
            name
            for name in self.deployment.machines
            if now - self.heard_s.get(name, -math.inf) > SILENT_AFTER_S
        ]

    def render(self) -> Group:
        """The table and what is to be said below it."""
        table = Table(*COLUMNS, title=self.deployment.name)
        silent, total_w, total_j = self.silent(), 0.0, 0.0
        for name, one in self.deployment.instances.items():
            state = self.states.get(one.machine)
            found = next((i for i in state.instances if i.name == name), None) if state else None
            if found is None or one.machine in silent:
                table.add_row(name, one.machine, *["?"] * (len(COLUMNS) - 2), style="red")
                continue
            total_w += found.power_w if math.isfinite(found.power_w) else 0.0
            total_j += found.energy_j
            table.add_row(name, one.machine, *self._cells(found))
        lines = [f"all instances: {total_w:,.0f} W, {total_j:,.0f} J since they came up"]
        lines += self._router_lines()
        lines += [f"[red]machine {name} is silent: run `biscale hw up` there[/]" for name in silent]
        lines += self._process_lines(silent)
        return Group(table, *(Text.from_markup(line) for line in lines))

    def _cells(self, one: InstanceState) -> list[str]:
        routed = "-"
        if self.router is not None and one.name in self.router.instances:
            load = self.router.instances[one.name]
            routed = f"{load.routed}" + ("" if load.open else " (closed)")
        lease = f"{one.lease_s:.1f} s" if one.lease_s > 0 else "none"
        return [
            one.policy,
            "driver" if one.freq_mhz == 0 else _number(one.freq_mhz, "{:.0f}"),
            _number(one.seen_mhz, "{:.0f} MHz"),
            _number(one.power_w, "{:,.0f} W"),
            _number(one.energy_j, "{:,.0f} J"),
            lease,
            f"{one.iterations_per_s:.0f}",
            str(one.batch),
            str(one.queue),
            _number(one.kv_use, "{:.0%}"),
            routed,
        ]

    def _router_lines(self) -> list[str]:
        if self.deployment.router.kind != "biscale":
            return ["attainment: not known, the router is not ours"]
        if self.router is None:
            return [f"[red]the router at {self.deployment.router.url} does not answer[/]"]
        r = self.router
        met = f"TTFT {_number(r.ttft_met, '{:.2%}')}, TPOT {_number(r.tpot_met, '{:.2%}')}"
        return [
            f"router: {r.requests} requests, {r.failed} failed, {r.rate_rps:.1f}/s lately; "
            f"within the SLO over 5 minutes: {met}"
        ]

    def _process_lines(self, silent: list[str]) -> list[str]:
        lines = []
        for name, state in self.states.items():
            if name in silent:
                continue
            wrong = {p: how for p, how in state.processes.items() if how != "up"}
            lines += [f"[yellow]{name}: {process} is {how}[/]" for process, how in wrong.items()]
            if state.refused:
                lines.append(f"[yellow]{name}: {state.refused} callers or commands refused[/]")
            lines += [f"[yellow]{name}: {text}[/]" for text in state.problems[-2:]]
        return lines

    def close(self) -> None:
        """Stop following."""
        self.reader.close()


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)


def ask_router(deployment: Deployment) -> RouterState | None:
    """State of our router; None: it does not answer."""
    url = deployment.router.url.rstrip("/") + ROUTER_STATE
    try:
        with urllib.request.urlopen(url, timeout=ROUTER_TIMEOUT_S) as answer:
            return msgspec.json.decode(_nan_for_null(answer.read()), type=RouterState)
    except (OSError, ValueError, msgspec.DecodeError):
        return None


def read_json_lines(url: str, path: str, kind: type[T]) -> list[T]:
    """Rows that our router tells at a path; empty where it does not answer."""
    try:
        with urllib.request.urlopen(url.rstrip("/") + path, timeout=10.0) as answer:
            return [msgspec.json.decode(line, type=kind) for line in answer.read().splitlines()]
    except (OSError, ValueError, msgspec.DecodeError):
        return []


def _nan_for_null(data: bytes) -> bytes:
    """JSON has no NaN: msgspec writes null, and a missing key is NaN again."""
    values = msgspec.json.decode(data)
    return msgspec.json.encode({k: v for k, v in values.items() if v is not None})
