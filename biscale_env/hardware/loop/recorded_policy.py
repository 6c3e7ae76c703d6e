"""Policies for hardware: those that have a name, and recordings played back."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.contract import ClockRange, Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant
from biscale_env.policies import phases_of, resolve_policy
from biscale_env.policies.policy_source import PHASES

RECORDING = ".parquet"
BASE = "base"


def _one_clock(
    clocks: ClockRange, freq_mhz: float, observation: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The action of a clock, MHz, for an observation or for each of several."""
    action = clocks.to_action(np.full((1,), freq_mhz))
    return action if observation.ndim == 1 else np.tile(action, (len(observation), 1))


class BaseClockPolicy:
    """Always the base clock of tier 1; the highest clock until there is one."""

    def __init__(self, clocks: ClockRange) -> None:
        self.clocks, self.freq_mhz = clocks, clocks.freq_max_mhz

    def predict(
        self,
        observation: NDArray[np.float32],
        state: Any = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], Any]:
        """The base clock as an action."""
        return _one_clock(self.clocks, self.freq_mhz, observation), None


class RecordedPolicy:
    """Plays recorded clocks back by time; before the first and after the last it holds the nearest.

    The clock of the playback starts at the first prediction. With ``now`` it can be driven by
    another clock.
    """

    def __init__(
        self, time_s: NDArray[np.float64], freq_mhz: NDArray[np.float64], clocks: ClockRange
    ) -> None:
        """Keep a recording.

        Args:
            time_s: times of the decisions since the start of the run, rising, s.
            freq_mhz: clock decided at each, MHz.
            clocks: range that the actions span.
        """
        if len(time_s) == 0 or len(time_s) != len(freq_mhz):
            raise BiscaleError("a recording needs as many clocks as times, and at least one")
        self.time_s, self.freq_mhz, self.clocks = (
            np.asarray(time_s, dtype=float),
            np.asarray(freq_mhz, dtype=float),
            clocks,
        )
        self._begun_s: float | None = None

    def at(self, now_s: float) -> float:
        """Clock requested last at a time of the recording, MHz."""
        k = int(np.searchsorted(self.time_s, now_s, side="right")) - 1
        return float(self.freq_mhz[max(k, 0)])

    def predict(
        self,
        observation: NDArray[np.float32],
        state: Any = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], Any]:
        """The recorded clock for now."""
        now = time.monotonic()
        if self._begun_s is None or (episode_start is not None and np.any(episode_start)):
            self._begun_s = now
        return _one_clock(self.clocks, self.at(now - self._begun_s), observation), None


def read_recording(path: Path, phase: str, clocks: ClockRange) -> RecordedPolicy:
    """Read the recording of a run.

    A timelines table of a run directory, or any table with ``time_s`` and ``freq_requested_mhz``.

    Raises:
        BiscaleError: the file cannot be read, or has other columns.
    """
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise BiscaleError(
            f"cannot read the recording {path}: {str(error).splitlines()[0]}"
        ) from None
    missing = {"time_s", "freq_requested_mhz"} - set(frame.columns)
    if missing:
        raise BiscaleError(
            f"{path} is no recording of decisions: the column '{min(missing)}' is missing"
        )
    if "phase" in frame.columns:
        frame = frame[frame["phase"] == phase]
    elif "run_id" in frame.columns:
        frame = frame[frame["run_id"] == _run_of(path, phase)]
    frame = frame.sort_values("time_s")
    return RecordedPolicy(
        frame["time_s"].to_numpy(), frame["freq_requested_mhz"].to_numpy(), clocks
    )


def _run_of(path: Path, phase: str) -> str:
    results = path.with_name("results.parquet")
    if results.is_file():
        table = pd.read_parquet(results, columns=["run_id", "phase"])
        found = table[table["phase"] == phase]["run_id"].tolist()
        if len(found) == 1:
            return str(found[0])
    raise BiscaleError(f"{path} holds several runs: give a table with one run of {phase}")


def load_policy(name: str, plant: Plant) -> Policy:
    """Make the policy that the user named.

    Args:
        name: in the syntax of :mod:`biscale_env.policies` (``mpc``, ``slack:margin=0.1``,
            ``agent:margin=0.1``, a checkpoint or run directory, ``module:Class``), a recording
            (``.parquet``), or ``base``, the base clock of tier 1.
        plant: the instance it is to control.

    Raises:
        BiscaleError: no such policy or file, or one made for another observation.
    """
    if name.endswith(RECORDING):
        return read_recording(Path(name), plant.phase, plant.clocks)
    if name == BASE:
        return BaseClockPolicy(plant.clocks)
    return resolve_policy(name, plant)


def recordable_phases(name: str) -> tuple[str, ...]:
    """Phases that a named policy can run; a recording says so only when it is read.

    Raises:
        BiscaleError: no such policy or checkpoint.
    """
    return PHASES if name.endswith(RECORDING) or name == BASE else phases_of(name)
