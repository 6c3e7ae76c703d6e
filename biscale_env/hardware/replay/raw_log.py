"""The one schema of a replay's raw log: which file holds rows of which kind.

================== ======================================================================
``replay.yaml``    settings, trace, start and end, what went wrong
requests.jsonl     :class:`~biscale_env.hardware.replay.client.RequestRecord`
iterations.jsonl   :class:`~biscale_env.hardware.replay.recorder.IterationRow`
decisions-P.jsonl  :class:`~biscale_env.hardware.loop.control.Decision`, per phase
clocks.jsonl       :class:`~biscale_env.hardware.loop.wire.ClockChange`
telemetry.parquet  samples of every GPU, :data:`~.recorder.TELEMETRY_COLUMNS`
live.jsonl         :class:`~.live_samples.LiveSample`: what the dashboard shows meanwhile
gpm.parquet        tensor and DRAM use, where the GPU tells
================== ======================================================================

All times are CLOCK_MONOTONIC seconds. Numbers that are missing are null in JSON and NaN in memory.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pandas as pd
import yaml

from biscale_env.config import InstanceSpec
from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.loop.control import Decision
from biscale_env.hardware.loop.wire import ClockChange
from biscale_env.hardware.replay.recorder import IterationRow
from biscale_env.hardware.replay.request_record import RequestRecord

FACTS = "replay.yaml"
REQUESTS = "requests.jsonl"
ITERATIONS = "iterations.jsonl"
CLOCKS = "clocks.jsonl"
TELEMETRY = "telemetry.parquet"
GPM = "gpm.parquet"
LIVE = "live.jsonl"
T = TypeVar("T")


def decisions_file(phase: str) -> str:
    """File of the decisions of one phase."""
    return f"decisions-{phase}.jsonl"


@dataclass(frozen=True)
class Raw:
    """Raw logs of one replay; all times CLOCK_MONOTONIC.

    Attributes:
        facts: settings, trace, start and end.
        requests: as the client saw them.
        iterations: engine records per phase.
        decisions: decisions per phase.
        changes: clock changes.
        telemetry: GPU samples.
    """

    facts: dict[str, Any]
    requests: list[RequestRecord]
    iterations: dict[str, list[IterationRow]]
    decisions: dict[str, list[Decision]]
    changes: list[ClockChange]
    telemetry: pd.DataFrame

    @property
    def phases(self) -> tuple[str, ...]:
        """Phases that were controlled."""
        return tuple(self.facts["settings"]["policies"])

    @property
    def instance(self) -> InstanceSpec:
        """The instance that was controlled; version 0.1 wrote its keys among the others."""
        settings = self.facts["settings"]
        if "instance" in settings:
            return InstanceSpec.of(**settings["instance"])
        known = {key: settings[key] for key in InstanceSpec.model_fields if key in settings}
        return InstanceSpec.of(**known)

    @property
    def start_s(self) -> float:
        """Time 0 of the trace."""
        return float(self.facts["started_s"])


def read_raw(folder: Path) -> Raw:
    """Read the logs.

    Raises:
        BiscaleError: this is not the raw folder of a replay.
    """
    try:
        facts = yaml.safe_load((folder / FACTS).read_text(encoding="utf-8"))
        telemetry = pd.read_parquet(folder / TELEMETRY)
        phases = list(facts["settings"]["policies"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise BiscaleError(
            f"{folder} holds no replay: give the folder that `biscale replay --out` wrote"
        ) from None
    rows = read_lines(folder / ITERATIONS, IterationRow)
    return Raw(
        facts,
        sorted(read_lines(folder / REQUESTS, RequestRecord), key=lambda r: r.index),
        {p: [r for r in rows if r.phase == p] for p in phases},
        {p: read_lines(folder / decisions_file(p), Decision) for p in phases},
        read_lines(folder / CLOCKS, ClockChange),
        telemetry,
    )


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """Rows of a JSON lines file as structs; nothing where the file is missing.

    A torn last line is left out.
    """
    return decoded_lines(path.read_bytes(), kind) if path.is_file() else []


def decoded_lines(data: bytes, kind: type[T]) -> list[T]:
    """JSON lines as structs; what is torn is left out."""
    decoder = msgspec.json.Decoder(kind)
    rows = []
    for line in data.splitlines():
        with contextlib.suppress(msgspec.DecodeError):
            rows.append(decoder.decode(_without_nulls(line)))
    return rows


def _without_nulls(line: bytes) -> bytes:
    """JSON has no NaN: our writers put null where a number is missing.

    Those keys are dropped, so that defaults (NaN) apply.
    """
    if b"null" not in line:
        return line
    with contextlib.suppress(json.JSONDecodeError):
        data = json.loads(line)
        return msgspec.json.encode({k: v for k, v in data.items() if v is not None})
    return line
