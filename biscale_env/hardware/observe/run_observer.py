"""Record a running engine under the load that it has, with or without visiting clocks."""

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.engines.hook_help import how_to_start_hook
from biscale_env.hardware.observe.exploring import EXPLORING
from biscale_env.hardware.replay.closed_loop import (
    INTERRUPTED,
    ClosedLoopReplay,
    ReplayOutcome,
    ReplaySettings,
)
from biscale_env.traces import Trace

TELL_S = 1.0


@dataclass(frozen=True)
class ObservedRun:
    """What was recorded.

    Attributes:
        folder: its logs; `biscale fit --from` reads them.
        iterations: recorded per phase.
        problems: sentences about what went wrong without ending the run.
    """

    folder: Path
    iterations: dict[str, int]
    problems: list[str]


class EngineObserver(ClosedLoopReplay):
    """A replay without a load of its own: somebody else's requests are what is measured."""

    def __init__(
        self,
        settings: ReplaySettings,
        raw: Path,
        duration_s: float,
        ended: threading.Event,
        tell: Callable[[float], None] = lambda elapsed_s: None,
    ) -> None:
        """Check what can be checked before anything is started.

        Args:
            settings: phases and their policies, GPUs, sockets; ``observe_only`` touches no clock.
            raw: folder for logs.
            duration_s: how long.
            ended: ends it early.
            tell: called every second with the time since the begin, s.

        Raises:
            BiscaleError: an unknown policy, or a GPU that is not there.
        """
        none: list[int] = []
        super().__init__(settings, Trace("live traffic", none, none, none, "observed"), raw)  # type: ignore[arg-type]
        self._duration_s, self._ended, self._tell_time = duration_s, ended, tell

    def _start_children(self) -> None:
        if self.settings.observe_only:  # nobody decides: nothing is started
            self.settings.instance.to_yaml(self.raw / "instance.yaml")
            return
        super()._start_children()

    def _load(self) -> ReplayOutcome:
        """Let time pass."""
        start_s, why = time.monotonic(), ""
        try:
            while (elapsed_s := time.monotonic() - start_s) < self._duration_s:
                self._tell_time(elapsed_s)
                if self._ended.wait(min(TELL_S, self._duration_s - elapsed_s)):
                    why = INTERRUPTED
                    break
                self._must_be_controlled()
        except KeyboardInterrupt:
            why = INTERRUPTED
        return ReplayOutcome(start_s, time.monotonic(), [], pd.DataFrame(), gone=why)

    def _silence(self, phase: str, newest_s: float | None, outcome: ReplayOutcome) -> list[str]:
        return []  # without requests of our own silence may be idleness


def observe(
    settings: ReplaySettings,
    out: Path,
    duration_s: float,
    ended: threading.Event | None = None,
    tell: Callable[[float], None] = lambda elapsed_s: None,
) -> ObservedRun:
    """Record the engines of some phases into ``out/raw``.

    What was recorded stays when it is ended early.

    Raises:
        BiscaleError: the folder holds a run, a process of ours does not start or ends, or no engine
            sent a record.
    """
    if (out / "raw").exists():
        raise BiscaleError(f"{out} holds a run already; choose another --out")
    if not duration_s > 0:
        raise BiscaleError(f"--duration {duration_s:g}: give a number of seconds above 0")
    stop = ended or threading.Event()
    observer = EngineObserver(settings, out / "raw", duration_s, stop, tell)
    outcome = observer.run()
    counts = outcome.records
    if not any(counts.values()):
        phase = observer.phases[0]
        start = how_to_start_hook(phase, settings.engine, settings.sockets)
        raise BiscaleError(f"no record came within {duration_s:g} s: {start}")
    quiet = [f"no record came from the {p} engine" for p, n in counts.items() if not n]
    if outcome.failed:
        raise BiscaleError(f"{outcome.failed}; what was recorded is in {out}")
    return ObservedRun(out, counts, quiet + outcome.problems)


def settings_of(phases: tuple[str, ...], explore: bool, **options: Any) -> ReplaySettings:
    """Settings of an observation.

    Args:
        phases: whose engines are recorded.
        explore: visit clocks; without it no clock is touched.
        options: of :class:`~biscale_env.hardware.replay.closed_loop.ReplaySettings`.
    """
    policies = dict.fromkeys(phases, EXPLORING if explore else "max")
    base = ReplaySettings(
        policies=policies, decode_url="", prefill_url=None, observe_only=not explore, **options
    )
    return dataclasses.replace(base, own_actuator=explore)
