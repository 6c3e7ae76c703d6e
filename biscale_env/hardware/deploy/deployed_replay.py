"""`biscale replay --deployment`: a trace against a deployment that is up, all of it recorded."""

import asyncio
import shutil
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import open_whole, write_whole
from biscale_env.evaluation.report.page import write_report
from biscale_env.evaluation.runs.run_view import Run, load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.hardware.deploy.deployed_raw import ROUTES, DeployedRaw, read_deployed
from biscale_env.hardware.deploy.deployment_file import EMULATED, Deployment
from biscale_env.hardware.deploy.feed_log import FeedLog
from biscale_env.hardware.deploy.machine_agent import local_machines
from biscale_env.hardware.deploy.pool_record import pool_record
from biscale_env.hardware.deploy.router_http import ROUTES as ROUTES_PATH
from biscale_env.hardware.deploy.router_http import Route
from biscale_env.hardware.loop.processes import elevated_priority, tuned_for_latency
from biscale_env.hardware.replay import raw_log
from biscale_env.hardware.replay.client import LoadSettings, Replayer, RequestRecord
from biscale_env.hardware.replay.closed_loop import INTERRUPTED, lateness_p99_s
from biscale_env.hardware.replay.engine_health import EngineGone
from biscale_env.traces import Trace

RAW = "raw"
NO_RECORD = "no record came from the engine of {}: start it with the hook (docs/deployment.md)"
MACHINES_S = 15.0  # how long machines are waited for
LAST_ROWS_S = 0.3  # the feed's way, after the last answer


@dataclass(frozen=True)
class DeployedReplay:
    """What to replay on.

    Attributes:
        deployment: what is up.
        at: machine whose keys are used; None: the first whose keys are here.
        vocabulary: token ids are drawn below this.
        timeout_s: longest life of one request.
        stall_s: silence after which the deployment counts as gone.
        api_key: of the engines; never written anywhere.
    """

    deployment: Deployment
    at: str | None = None
    vocabulary: int = 32_000
    timeout_s: float = 600.0
    stall_s: float = 30.0
    api_key: str | None = field(default=None, repr=False)

    @property
    def engine(self) -> str:
        """A label of the results: ``emulated`` or ``deployed``."""
        backends = {machine.backend for machine in self.deployment.machines.values()}
        return "emulated" if backends == {EMULATED} else "deployed"

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        d = self.deployment
        return {
            "deployment": d.model_dump(mode="json"),
            "policies": {name: d.policy(name) for name in d.instances},
            "engine": self.engine,
            "delay_s": d.bounds.delay_s,
            "vocabulary": self.vocabulary,
        }


@dataclass
class DeployedOutcome:
    """What became of a replay.

    Attributes:
        out: the run directory.
        raw: its logs.
        view: the run directory, read back.
        problems: sentences about what went wrong without ending the run.
        gone: why the deployment was given up; empty when it was not.
        silent: instances whose engine sent no record.
    """

    out: Path
    raw: DeployedRaw
    view: Run | None
    problems: list[str] = field(default_factory=list)
    gone: str = ""
    silent: list[str] = field(default_factory=list)

    def raise_trouble(self) -> None:
        """Say what went wrong, the gravest first.

        Raises:
            KeyboardInterrupt: the user ended the replay.
            BiscaleError: the deployment went away, an engine never sent a record, or requests
                failed.
        """
        if self.gone == INTERRUPTED:
            raise KeyboardInterrupt
        if self.gone:
            raise BiscaleError(f"{self.gone}; what was measured is in {self.out}")
        if self.silent:
            raise BiscaleError(f"{NO_RECORD.format(self.silent[0])}; see {self.out / RAW}")
        failed = [r for r in self.raw.requests if r.failed]
        if failed:
            raise BiscaleError(
                f"{len(failed)} of {len(self.raw.requests)} requests failed, the first: "
                f"{failed[0].error}; see {self.out / RAW}"
            )


def run_deployed_replay(
    settings: DeployedReplay,
    trace: Trace,
    out: Path,
    tell: Callable[[RequestRecord], None] = lambda record: None,
) -> DeployedOutcome:
    """Replay into a run directory: a row per pool, the logs of all instances in ``raw``.

    Args:
        settings: what to replay on.
        trace: the load.
        out: the run directory.
        tell: called with every finished request.

    Raises:
        BiscaleError: a machine is silent or a process down; nothing was sent.
    """
    folder = out / RAW
    empty = not (out.is_dir() and any(out.iterdir()))
    config = {
        "replay": settings.plain(),
        "trace": {"name": trace.name, "source": trace.source, "requests": len(trace)},
    }
    try:
        with RunDirectory(out, config, inputs={f"trace {trace.name}": trace.sha256}) as run:
            gone, problems, silent = _measure(settings, trace, folder, tell)
            raw = read_deployed(folder)
            for phase in ("prefill", "decode"):
                run.add(pool_record(raw, phase))
    except BaseException:
        log = folder / raw_log.REQUESTS
        if empty and not (log.is_file() and log.stat().st_size):
            shutil.rmtree(out, ignore_errors=True)
        raise
    view = load_run(out)
    write_report(view)
    return DeployedOutcome(out, raw, view, problems, gone, silent)


def _measure(
    settings: DeployedReplay, trace: Trace, folder: Path, tell: Callable[[RequestRecord], None]
) -> tuple[str, list[str], list[str]]:
    """Send the trace and record; why it was given up, problems, and silent instances."""
    d = settings.deployment
    folder.mkdir(parents=True, exist_ok=True)
    log = FeedLog(d, settings.at, local_machines(d), folder)
    log.start()
    gone = ""
    try:
        log.wait_for_machines(MACHINES_S)
        load = LoadSettings(
            d.router.url,
            vocabulary=settings.vocabulary,
            timeout_s=settings.timeout_s,
            stall_s=settings.stall_s,
            api_key=settings.api_key,
        )
        with (
            (folder / raw_log.REQUESTS).open("wb") as file,
            tuned_for_latency(),
            elevated_priority(),
        ):
            replayer = Replayer(trace, load, file, tell)
            try:
                asyncio.run(replayer.run())
            except EngineGone as error:
                gone = str(error)
            except KeyboardInterrupt:
                gone = INTERRUPTED
        ended_s = time.monotonic()
        time.sleep(LAST_ROWS_S)
    finally:
        log.stop()
    problems = list(log.problems)
    if d.router.kind == "biscale":
        problems += _fetch_routes(d, replayer.run_id, folder / ROUTES)
    silent = [name for name in d.instances if name not in log.heard]
    silent = [] if gone else [name for name in silent if _was_used(folder, name)]
    problems += [NO_RECORD.format(name) for name in silent]
    for state in log.states.values():
        problems += [f"{state.machine}: {text}" for text in state.problems]
    with open_whole(folder / raw_log.TELEMETRY) as temporary:
        log.telemetry().to_parquet(temporary, index=False)
    key = settings.api_key
    late = {name: lateness_p99_s(one.engine, key) for name, one in d.instances.items()}
    facts = {
        "settings": settings.plain(),
        "trace": trace.name,
        "started_s": replayer.started_s,
        "ended_s": ended_s,
        "problems": problems,
        "gone": gone,
        "failed": "",
        "lateness_p99_s": {name: value for name, value in late.items() if value is not None},
    }
    write_whole(folder / raw_log.FACTS, yaml.safe_dump(facts, sort_keys=False))
    return gone, problems, silent


def _fetch_routes(deployment: Deployment, run_id: str, path: Path) -> list[str]:
    """Get the router's record of our requests; a sentence when that fails."""
    url = f"{deployment.router.url.rstrip('/')}{ROUTES_PATH}?prefix={run_id}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            write_whole(path, answer.read())
    except (OSError, ValueError) as error:
        return [f"the router does not tell where requests went ({error})"]
    return []


def _was_used(folder: Path, name: str) -> bool:
    """Whether a request was routed to an instance."""
    routes = raw_log.read_lines(folder / ROUTES, Route)
    return any(name in (route.prefill, route.decode) for route in routes)
