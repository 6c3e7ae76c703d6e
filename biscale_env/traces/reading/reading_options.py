"""How a trace file is to be read: the options that every command with a trace has."""

import re
from datetime import UTC, datetime
from typing import Final

from pydantic import Field, field_validator

from biscale_env.config.loader import Config
from biscale_env.core.errors import BiscaleError

SECONDS_PER: Final = {"": 1.0, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class ReadingOptions(Config):
    """Which columns, unit, order and part of a trace.

    Attributes:
        time_column: column of the arrival time; None (as for the others): by the known formats.
        prompt_column: column of the prompt length.
        output_column: column of the output length.
        class_column: column of SLO classes; None takes ``slo_class``, where there is one.
        time_unit: unit of a numeric time: s, ms, us or ns.
        block_tokens: tokens of a block of ``hash_ids``; None: as documented, or by the lengths.
        sort: accept unsorted times and sort them, instead of refusing the file.
        start: use requests from here on: seconds after the trace's start (``90``, ``15min``,
            ``2h``, ``1d``), or a date for a trace of dates; times count from there.
        stop: use requests before this, written as ``start``.
        drop_failed: leave out requests without an answer, instead of reading their output as one
            token.
    """

    time_column: str | None = None
    prompt_column: str | None = None
    output_column: str | None = None
    class_column: str | None = None
    time_unit: str | None = None
    block_tokens: int | None = Field(default=None, gt=0)
    sort: bool = False
    start: str | None = None
    stop: str | None = None
    drop_failed: bool = False

    @field_validator("start", "stop", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        return f"{value:.12g}" if isinstance(value, int | float) else value

    @property
    def is_default(self) -> bool:
        """Whether nothing was asked for."""
        return self == ReadingOptions()

    @property
    def for_files(self) -> "ReadingOptions":
        """Without the part, which generated traces can be asked for too."""
        return self.model_copy(update={"start": None, "stop": None})

    def part_s(self, origin_unix_s: float | None, name: str) -> tuple[float, float]:
        """First and last time of the part, s after the trace's start.

        Args:
            origin_unix_s: Unix time of the trace's start; None where it is not known.
            name: the trace, for messages.

        Raises:
            BiscaleError: a time that cannot be read, a date without a trace of dates, or an empty
                part.
        """
        first = moment_s(self.start, "--from", origin_unix_s, name) if self.start else 0.0
        last = moment_s(self.stop, "--to", origin_unix_s, name) if self.stop else float("inf")
        if not first < last:
            raise BiscaleError(
                f"{name}: --from {self.start or 0} to --to {self.stop or 'the end'} is no part of "
                "the trace: --to must lie behind --from and behind the trace's start"
            )
        return first, last


def moment_s(text: str, option: str, origin_unix_s: float | None, name: str) -> float:
    """A time of the command line, s after the trace's start; a date before that is the start.

    Raises:
        BiscaleError: neither a number with a unit nor a date, or a date where there are none.
    """
    number = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*(s|min|m|h|d|)\s*", text)
    if number:
        return float(number[1]) * SECONDS_PER[number[2]]
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError:
        raise BiscaleError(
            f"{option} takes a time after the start such as 600, 15min, 2h or 1d, or a date, got "
            f"'{text}'"
        ) from None
    if origin_unix_s is None:
        raise BiscaleError(
            f"{name}: the times of this trace are no dates, so {option} takes a time after its "
            f"start such as 600, 15min, 2h or 1d, not '{text}'"
        )
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(when.timestamp() - origin_unix_s, 0.0)
