"""A replay into a run directory: the same tables as of simulated runs, with the raw logs beside."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.page import write_report
from biscale_env.evaluation.runs.run_files import CONFIG
from biscale_env.evaluation.runs.run_view import Run, load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.hardware.engines.hook_help import how_to_start_hook
from biscale_env.hardware.replay import raw_log
from biscale_env.hardware.replay.assemble import run_record
from biscale_env.hardware.replay.closed_loop import (
    INTERRUPTED,
    ClosedLoopReplay,
    ReplayOutcome,
    ReplaySettings,
)
from biscale_env.hardware.replay.request_record import RequestRecord
from biscale_env.traces import Trace, load_named, read_trace
from biscale_env.traces.reading.reading_options import ReadingOptions

RAW = "raw"
UNCONTROLLED = "driver"  # name of the policy of a phase that ran at the driver's clocks


@dataclass(frozen=True)
class MeasuredRun:
    """What a replay left.

    Attributes:
        out: the run directory.
        outcome: how it went.
        raw: its logs.
        uncontrolled: phases whose policy never decided, for want of a record of their engine; their
            results stand under the name "driver".
        view: the run directory, read back.
    """

    out: Path
    outcome: ReplayOutcome
    raw: raw_log.Raw
    uncontrolled: tuple[str, ...]
    view: Run

    def raise_trouble(self) -> None:
        """Say what went wrong, the gravest first.

        Raises:
            KeyboardInterrupt: the user ended the replay.
            BiscaleError: the engine went away, a process of ours gave up, a policy never decided,
                or requests failed.
        """
        kept = f"clocks are restored, what was measured is in {self.out}"
        if self.outcome.gone == INTERRUPTED:
            raise KeyboardInterrupt
        for trouble in (self.outcome.gone, self.outcome.failed):
            if trouble:
                raise BiscaleError(f"{trouble}; {kept}")
        for phase in self.uncontrolled:
            settings = self.raw.facts["settings"]
            start = how_to_start_hook(phase, settings["engine"], Path(settings["sockets"]))
            raise BiscaleError(
                f"no record came from the {phase} engine, so its policy decided nothing and the "
                f"results of {phase} are those of the driver's clocks: {start}; {kept}"
            )
        failed = [r for r in self.raw.requests if r.failed]
        if failed:
            raise BiscaleError(
                f"{len(failed)} of {len(self.raw.requests)} requests failed, "
                f"the first: {failed[0].error}; see {self.out / RAW}"
            )


def must_be_free(out: Path) -> None:
    """Refuse a folder that holds a run: a replay measures once, it cannot resume.

    Raises:
        BiscaleError: there is a run in it.
    """
    if (out / CONFIG).is_file():
        raise BiscaleError(f"{out} holds a run already; choose another --out")


def gpus_of_phases(
    groups: Mapping[str, tuple[str, ...]], phases: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """GPUs of each phase of a replay.

    Raises:
        BiscaleError: a phase has none.
    """
    missing = [phase for phase in phases if phase not in groups]
    if missing:
        raise BiscaleError(f"--gpus names no GPUs for {missing[0]}: add --gpus {missing[0]}=...")
    return {phase: groups[phase] for phase in phases}


def trace_to_replay(
    name: str,
    duration_s: float | None,
    rate_rps: float | None,
    seed: int,
    reading: ReadingOptions | None = None,
) -> Trace:
    """The load: a trace by name or file, thinned to a mean rate, and its first seconds.

    Raises:
        BiscaleError: no such trace, or no request is left.
    """
    if Path(name).exists():
        trace = read_trace(Path(name), options=reading)
    else:
        trace = load_named(name, reading)
    if rate_rps is not None:
        trace = trace.scaled_to(rate_rps, seed)
    if duration_s is not None:
        trace = trace.window(0.0, duration_s)
    if not len(trace):
        within = f" within the first {duration_s:g} s: use a longer --duration"
        raise BiscaleError(f"{name}: no request{within if duration_s is not None else ' in it'}")
    return trace


def run_replay(
    settings: ReplaySettings,
    trace: Trace,
    out: Path,
    tell: Callable[[RequestRecord], None] = lambda record: None,
) -> MeasuredRun:
    """Replay into a run directory.

    What was measured is kept when the engine goes away midway. A phase whose engine never sent a
    record ran at the driver's clocks: its result gets the policy's name only where nothing was to
    be set anyway (``observe_only``).

    Args:
        settings: what to run where.
        trace: the load.
        out: the run directory.
        tell: called with every finished request.

    Raises:
        BiscaleError: something does not start; nothing was measured, and the folder is as before.
    """
    config = {
        "replay": settings.plain(),
        "trace": {"name": trace.name, "source": trace.source, "requests": len(trace)},
    }
    folder = out / RAW
    replay = ClosedLoopReplay(settings, trace, folder, tell)
    empty = not (out.is_dir() and any(out.iterdir()))
    try:
        with RunDirectory(out, config, inputs={f"trace {trace.name}": trace.sha256}) as run:
            outcome = replay.run()
            raw = raw_log.read_raw(folder)
            silent = () if settings.observe_only else tuple(outcome.silent)
            for phase in raw.phases:
                record = run_record(raw, phase, replay.plants[phase].gpu.freq_max_mhz)
                if phase in silent:
                    record = dataclasses.replace(record, policy=UNCONTROLLED)
                run.add(record)
    except BaseException:
        log = folder / raw_log.REQUESTS
        measured = log.is_file() and log.stat().st_size
        if empty and not measured:  # the same command may be given again
            shutil.rmtree(out, ignore_errors=True)
        raise
    view = load_run(out)
    write_report(view)
    return MeasuredRun(out, outcome, raw, silent, view)
