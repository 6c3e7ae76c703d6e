"""What a reader made of a file, in one sentence: nothing about it is decided silently."""

import logging
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from biscale_env.core.errors import BiscaleWarning
from biscale_env.traces.reading.time_units import LEAST_RPS, MOST_RPS, is_plausible

# mean gaps of silence before the first request: e^-100 if arrivals were random
SILENCE_GAPS = 100
LOGGER = logging.getLogger("biscale_env.traces")


@dataclass
class Recognised:
    """What was recognised in a trace file, filled while it is read.

    Attributes:
        file: the file.
        format: name of the format.
        time_unit: ``dates``, or unit of the numbers.
        unit_because: why this unit.
        requests: requests that were read.
        rows_dropped: rows that were left out (`drop_failed`, warm-up requests).
        failed_kept: requests with an answer that the file says failed, and that were kept.
        zero_outputs: outputs of 0 tokens, read as 1, since prefill itself makes the first token.
        offset_s: time of the first request that was taken off all times, s.
        origin_unix_s: Unix time of the trace's start; None where times are no dates.
        part: the part of the trace that was read, in words; empty for all of it.
        block_tokens: tokens of a block of a prompt; 0 where nobody says what prompts share.
        has_sessions: whether the file says which requests belong together.
        classes: SLO classes of requests, by name.
    """

    file: str
    format: str = ""
    time_unit: str = ""
    unit_because: str = ""
    requests: int = 0
    rows_dropped: int = 0
    failed_kept: int = 0
    zero_outputs: int = 0
    offset_s: float = 0.0
    origin_unix_s: float | None = None
    part: str = ""
    block_tokens: int = 0
    has_sessions: bool = False
    classes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionary, ready for JSON."""
        return asdict(self)

    def kind(self) -> str:
        """The file, its format and the unit of its times, known from its first rows on."""
        because = f" ({self.unit_because})" if self.unit_because else ""
        unit = "times are dates" if self.time_unit == "dates" else f"time in {self.time_unit}"
        return f"{self.file}: {self.format}, {unit}{because}"

    def sentence(self) -> str:
        """Everything in one line."""
        parts = [
            self.kind(),
            f"{self.requests:,} requests",
            f"{self.rows_dropped:,} rows dropped",
            f"{self.zero_outputs:,} outputs of 0 tokens"
            + (" read as 1 (--drop-failed leaves them out)" if self.zero_outputs else ""),
            f"offset of {self.offset_s:.9g} s removed: times count from the first request"
            if self.offset_s
            else "no offset removed",
        ]
        if self.failed_kept:
            parts.append(f"{self.failed_kept:,} failed requests kept (--drop-failed)")
        if self.classes:
            parts.append(f"SLO classes {', '.join(self.classes)}")
        if self.block_tokens:
            sessions = "sessions" if self.has_sessions else "sessions by shared blocks"
            parts.append(f"prompts in blocks of {self.block_tokens} tokens, {sessions}")
        return ", ".join([*parts, self.part] if self.part else parts)

    def tell(self, rate_rps: float, late_s: float = 0.0) -> None:
        """Log the sentence, and warn about a rate that no trace of requests has.

        Args:
            rate_rps: mean rate between its first and its last request, requests/s.
            late_s: time from the trace's start to its first request, s.
        """
        LOGGER.info(self.sentence())
        if late_s > SILENCE_GAPS / max(rate_rps, LEAST_RPS):
            warnings.warn(
                f"the first request of {self.file} comes {late_s:.9g} s after its start: if this "
                f"is a slice, --from {late_s:.9g} counts from there",
                BiscaleWarning,
                stacklevel=3,
            )
        if self.requests > 1 and not is_plausible(rate_rps):
            beyond = f"above {MOST_RPS:,.0f} a second"
            if rate_rps < LEAST_RPS:
                beyond = "below one an hour"
            warnings.warn(
                f"{self.file} has {rate_rps:.3g} requests/s, {beyond}: is the time unit "
                f"({self.time_unit}) right? --time-unit changes it",
                BiscaleWarning,
                stacklevel=3,
            )
