"""The closed loop: actuator and controllers as processes, the trace as load, all recorded."""

import asyncio
import contextlib
import time
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from biscale_env.config import InstanceSpec
from biscale_env.config.slo import one_bound
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import open_whole, write_whole
from biscale_env.envs.plant import Means, Plant, PlantSettings
from biscale_env.hardware.clocks.backend_registry import open_backend
from biscale_env.hardware.emulation.emulate import all_records_endpoint
from biscale_env.hardware.engines.engine_instance import ENGINE_INSTANCE
from biscale_env.hardware.engines.hook_help import how_to_start_hook
from biscale_env.hardware.engines.http_access import base_url, read_url
from biscale_env.hardware.engines.sources import parse_prometheus
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.processes import Child, elevated_priority, tuned_for_latency
from biscale_env.hardware.loop.recorded_policy import load_policy, recordable_phases
from biscale_env.hardware.replay import raw_log
from biscale_env.hardware.replay.client import LoadSettings, Replayer
from biscale_env.hardware.replay.engine_health import EngineGone
from biscale_env.hardware.replay.recorder import IterationLog, Telemetry
from biscale_env.hardware.replay.request_record import RequestRecord
from biscale_env.traces import Trace

PHASES = ("prefill", "decode")
GAVE_UP = 2  # exit code of our own sentences; a process that was killed has another
BISCALE = {"prefill": "mpc", "decode": "slack"}
INTERRUPTED = "interrupted"
SILENT_S = 5.0  # answers without a record: no batch takes so long
SETTLE_S = 0.5  # after the controllers are ready: sockets connect


@dataclass(frozen=True)
class ReplaySettings:
    """One replay.

    Attributes:
        policies: policy per phase.
        decode_url: engine that streams.
        prefill_url: prefill engine; None for an engine without a separate prefill pool.
        gpus: GPUs per phase.
        backend: clock backend.
        engine: what kind of engine it is, a label: ``vllm``, ``sglang``, ``dynamo`` or
            ``emulated``.
        sockets: folder of the sockets that the engine's hooks use.
        own_actuator: start an actuator; False uses one that runs already on these sockets (e.g. as
            root).
        observe_only: set no clock.
        instance: GPU, LLM, fitted model, limits and SLO that observation and controllers use.
        delay_s: expected actuation delay; None takes the model's.
        lease_s: lease of the clocks.
        vocabulary: token ids are drawn below this.
        timeout_s: longest life of one request.
        stall_s: silence, or nothing but refusals, after which the engine counts as gone.
        api_key: of the engines; never written anywhere.
        look_ahead: controllers decide for the begin of the iteration that a record is about.
        means: how clocks are held, ``lock`` or ``cap``.
    """

    policies: Mapping[str, str]
    decode_url: str
    prefill_url: str | None
    gpus: Mapping[str, tuple[str, ...]]
    backend: str = "nvml"
    engine: str = "vllm"
    sockets: Path = Path("/tmp/biscale")
    own_actuator: bool = True
    observe_only: bool = False
    instance: InstanceSpec = ENGINE_INSTANCE
    delay_s: float | None = None
    lease_s: float = 1.5
    vocabulary: int = 32_000
    timeout_s: float = 600.0
    stall_s: float = 30.0
    api_key: str | None = field(default=None, repr=False)
    look_ahead: bool = True
    means: Means = "lock"

    def plant(self, phase: str) -> Plant:
        """Plant that observation and controllers of a phase are made from."""
        settings = PlantSettings.of(
            phase,
            instance=self.instance,
            actuation_delay_s=self.delay_s,
            drain=True,
            means=self.means,
        )
        plant = Plant(settings)
        one_bound(plant.slo, "a replay")
        return plant

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "api_key"}
        return {
            **data,
            "sockets": str(self.sockets),
            "gpus": {k: list(v) for k, v in self.gpus.items()},
            "policies": dict(self.policies),
            "instance": self.instance.model_dump(mode="json"),
        }


@dataclass
class ReplayOutcome:
    """What a replay measured.

    Attributes:
        started_s: CLOCK_MONOTONIC of the trace's time 0.
        ended_s: last answer.
        requests: one record per request.
        telemetry: GPU samples.
        problems: sentences about what went wrong without ending the run.
        gone: why the engine was given up; empty when it was not.
        lateness_s: emulated engines only: how late answers left, P99 per phase, s. A busy machine
            makes them late, and latencies too long.
        failed: why a process of ours gave up; empty when none did. Serving went on, the clocks are
            the driver's.
        silent: phases whose engine sent no record: no policy decided there.
        records: how many came, per phase.
    """

    started_s: float
    ended_s: float
    requests: list[RequestRecord]
    telemetry: pd.DataFrame
    problems: list[str] = field(default_factory=list)
    gone: str = ""
    lateness_s: dict[str, float] = field(default_factory=dict)
    failed: str = ""
    silent: list[str] = field(default_factory=list)
    records: dict[str, int] = field(default_factory=dict)


def policies_by_phase(names: list[str], phases: tuple[str, ...] = PHASES) -> dict[str, str]:
    """Policy of each phase.

    ``biscale`` is MPC for prefill and the slack rule for decode. ``PHASE=NAME`` names one; a bare
    name goes to every phase that it can run and that has none; what is left runs at max clock.

    Raises:
        BiscaleError: an unknown phase, or a policy for a phase that it cannot run.
    """
    chosen: dict[str, str] = {}
    bare: list[str] = []
    for name in names:
        phase, equals, policy = name.partition("=")
        if equals and phase in PHASES:
            if phase not in phases:
                raise BiscaleError(f"--policy {name}: there is no {phase} engine in this replay")
            chosen[phase] = policy
        elif name == "biscale":
            bare += [rule for phase, rule in BISCALE.items() if phase in phases]
        else:
            bare.append(name)
    for name in bare:
        able = [phase for phase in recordable_phases(name) if phase in phases]
        if not able:
            raise BiscaleError(
                f"--policy {name} can run none of the phases of this replay: {', '.join(phases)}"
            )
        for phase in able:
            chosen.setdefault(phase, name)
    return {phase: chosen.get(phase, "max") for phase in phases}


class ClosedLoopReplay:
    """Runs one replay and keeps the raw measurements in ``raw``."""

    def __init__(
        self,
        settings: ReplaySettings,
        trace: Trace,
        raw: Path,
        tell: Callable[[RequestRecord], None] = lambda r: None,
    ) -> None:
        """Check everything that can be checked before anything is started.

        Args:
            settings: what to run where.
            trace: the load.
            raw: folder for logs.
            tell: called with every finished request.

        Raises:
            BiscaleError: an unknown policy, a checkpoint for another observation, a GPU that is not
                there.
        """
        self.settings, self.trace, self.raw, self.tell = settings, trace, raw, tell
        self.phases = tuple(settings.policies)
        self.plants = {phase: settings.plant(phase) for phase in self.phases}
        for phase in self.phases:
            load_policy(settings.policies[phase], self.plants[phase])
        self.backend = open_backend(settings.backend, observe_only=True)
        self.uuids = {
            phase: [self.backend.device(key).uuid for key in settings.gpus[phase]]
            for phase in self.phases
        }
        self._children: list[Child] = []
        self._died: list[str] = []
        self._failed = ""

    def run(self) -> ReplayOutcome:
        """Start our processes, send the trace, measure, and stop everything.

        Raises:
            BiscaleError: a process does not start or ends before the load begins, nobody would set
                the clocks, or no engine answers at the start.
        """
        s = self.settings
        self.raw.mkdir(parents=True, exist_ok=True)
        endpoints = {phase: all_records_endpoint(s.sockets, phase) for phase in self.phases}
        telemetry = Telemetry(self.backend, self.uuids, live=self.raw / raw_log.LIVE)
        log = IterationLog(endpoints, self.raw / raw_log.ITERATIONS)
        telemetry.start()
        log.start()
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(self._stop_children)
                self._start_children()
                time.sleep(SETTLE_S)
                self._must_be_controlled()
                outcome = self._load()
                time.sleep(2 * telemetry.period_s)  # one more sample, before the clocks go back
        finally:
            telemetry.stop()
            log.stop()
            self.backend.close()
        outcome.telemetry = telemetry.frame()
        newest_s = {row.phase: row.heard_s for row in log.rows}
        outcome.records = {p: sum(row.phase == p for row in log.rows) for p in self.phases}
        outcome.silent = [phase for phase in self.phases if phase not in newest_s]
        for phase in self.phases:
            outcome.problems += self._silence(phase, newest_s.get(phase), outcome)
        outcome.problems += self._died + telemetry.problems[:3] + log.problems[:3]
        outcome.failed = self._failed
        self._save(outcome, telemetry)
        return outcome

    def _silence(self, phase: str, newest_s: float | None, outcome: ReplayOutcome) -> list[str]:
        """What there is to say about records that never came, or ended before the answers did."""
        s = self.settings
        if newest_s is None:
            start = how_to_start_hook(phase, s.engine, s.sockets)
            return [f"no record came from the {phase} engine: {start}"] if s.observe_only else []
        done = [(r.prefill_done_s, r.last_chunk_s) for r in outcome.requests]
        answers = [times[phase == "decode"] for times in done]
        quiet_s = max((t for t in answers if t == t), default=newest_s) - newest_s
        if quiet_s <= SILENT_S:
            return []
        return [
            f"the {phase} engine went on answering for {quiet_s:.0f} s after its last record: its "
            "hook fell silent (its log says why), and the clock was the driver's from then on"
        ]

    def _start_children(self) -> None:
        """Actuator first, then the controllers, each from a settings file in the raw folder."""
        s = self.settings
        s.instance.to_yaml(self.raw / "instance.yaml")
        if s.own_actuator:
            groups = [f"{phase}={','.join(self.uuids[phase])}" for phase in self.phases]
            options = {
                "gpus": groups,
                "backend": s.backend,
                "sockets": str(s.sockets),
                "lease": s.lease_s,
                "means": s.means,
                "log": str(self.raw / raw_log.CLOCKS),
                "observe_only": s.observe_only,
                "instance": str(self.raw / "instance.yaml"),
            }
            self._start("actuator", "actuate", options).wait_for("actuator ready")
        controllers = [
            self._start(f"{phase} controller", "control", self._control_options(phase))
            for phase in self.phases
        ]
        for child in controllers:
            child.wait_for("controller ready", 120)

    def _control_options(self, phase: str) -> dict[str, object]:
        s = self.settings
        return {
            "phase": phase,
            "policy": s.policies[phase],
            "sockets": str(s.sockets),
            "instance": str(self.raw / "instance.yaml"),
            "delay": self.plants[phase].delay_s(-1),
            "lease": s.lease_s,
            "look_ahead": s.look_ahead,
            "means": s.means,
            "backend": s.backend,
            "gpus": ",".join(self.uuids[phase]),
            "log": str(self.raw / raw_log.decisions_file(phase)),
        }

    def _start(self, name: str, command: str, options: dict[str, object]) -> Child:
        file = self.raw / f"{name.replace(' ', '-')}.yaml"
        child = Child.with_settings(name, ("hw", command), options, file)
        self._children.append(child)
        return child

    def _must_be_controlled(self) -> None:
        """Refuse to send the load where it would run at the driver's clocks under a policy's name.

        Raises:
            BiscaleError: a process of ours has ended, or no actuator listens on these sockets.
        """
        s = self.settings
        for child in self._children:
            if not child.running:
                raise BiscaleError(f"{child.reason()}; nothing was sent")
        for phase in () if s.observe_only else self.phases:
            if not wire.somebody_listens(wire.command_endpoint(s.sockets, phase)):
                raise BiscaleError(
                    f"no actuator takes commands for {phase} in {s.sockets}, nothing was sent: "
                    "start `biscale hw actuate` there, or leave --no-actuator out"
                )

    def _load(self) -> ReplayOutcome:
        s = self.settings
        load = LoadSettings(
            s.decode_url,
            s.prefill_url,
            vocabulary=s.vocabulary,
            timeout_s=s.timeout_s,
            stall_s=s.stall_s,
            api_key=s.api_key,
        )
        gone = ""
        with (
            (self.raw / raw_log.REQUESTS).open("wb") as out,
            tuned_for_latency(),
            elevated_priority(),
        ):
            replayer = Replayer(self.trace, load, out, self.tell)
            try:
                asyncio.run(replayer.run())
            except EngineGone as error:
                gone = str(error)
            except KeyboardInterrupt:  # what was measured is worth as much as after a lost engine
                gone = INTERRUPTED
        ended_s = max(
            (r.last_chunk_s for r in replayer.records if r.last_chunk_s == r.last_chunk_s),
            default=time.monotonic(),
        )
        urls = {"prefill": s.prefill_url, "decode": s.decode_url}
        late = {phase: lateness_p99_s(str(urls[phase]), s.api_key) for phase in self.phases}
        known = {phase: value for phase, value in late.items() if value is not None}
        return ReplayOutcome(
            replayer.started_s,
            ended_s,
            replayer.records,
            pd.DataFrame(),
            gone=gone,
            lateness_s=known,
        )

    def _stop_children(self) -> None:
        """Controllers first, so that the actuator hears no more; the actuator resets the clocks."""
        dead = [child for child in self._children if not child.running]
        self._died = [child.reason() for child in dead]
        self._failed = "; ".join(
            child.reason() for child in dead if child.process.returncode == GAVE_UP
        )
        for child in reversed(self._children):
            child.stop()

    def _save(self, outcome: ReplayOutcome, telemetry: Telemetry) -> None:
        with open_whole(self.raw / raw_log.TELEMETRY) as temporary:
            outcome.telemetry.to_parquet(temporary, index=False)
        if telemetry.gpm_samples:
            with open_whole(self.raw / raw_log.GPM) as temporary:
                pd.DataFrame(telemetry.gpm_samples).to_parquet(temporary, index=False)
        facts = {
            "settings": self.settings.plain(),
            "trace": self.trace.name,
            "started_s": outcome.started_s,
            "ended_s": outcome.ended_s,
            "problems": outcome.problems,
            "gone": outcome.gone,
            "failed": outcome.failed,
            "lateness_p99_s": outcome.lateness_s,
        }
        write_whole(self.raw / raw_log.FACTS, yaml.safe_dump(facts, sort_keys=False))


def wait_for_engines(urls: Sequence[str], wait_s: float, api_key: str | None = None) -> None:
    """Wait until every engine lists its models, or until time is up.

    What is missing then is said when the replay starts, and so is an answer that says no.
    """
    deadline = time.monotonic() + wait_s
    for url in urls:
        while time.monotonic() < deadline:
            try:
                read_url(f"{base_url(url)}/v1/models", 2.0, api_key)
                break
            except urllib.error.HTTPError as error:
                if error.code < 500:  # it is up; a proxy ahead of it says 502 to 504 until it is
                    break
            except (OSError, ValueError):
                pass
            time.sleep(0.3)


def lateness_p99_s(url: str, api_key: str | None = None) -> float | None:
    """How late an emulated engine answered, P99 in s.

    None for real engines and for those that are gone.
    """
    try:
        values = parse_prometheus(read_url(f"{base_url(url)}/metrics", 2.0, api_key))
    except (OSError, ValueError):
        return None
    return values.get("vllm:lateness_p99_seconds") if "biscale_emulated:engine" in values else None
