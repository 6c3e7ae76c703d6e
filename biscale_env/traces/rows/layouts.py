"""Which columns of a file hold the time and the lengths: the known layouts, found by the header."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from biscale_env.core.errors import BiscaleError

TimeUnit = Literal["s", "ms", "us", "ns"]

NS_PER_UNIT: Final[dict[str, int]] = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1000, "ns": 1}
META_KEY = "biscale_duration_s"  # Parquet metadata that `write_trace` leaves
BLOCK_KEY = "biscale_block_tokens"  # likewise; in JSON lines it is a key
BLOCK_SIZES: Final = ("block_size", "block_tokens", "hash_block_size")  # likewise, of others
N_COLUMNS: Final = 3  # time, prompt, output
SLO_CLASS: Final = "slo_class"  # column of SLO classes, ours; --class-column names another
UNIT_KEY = "time_unit"  # key that `write_trace` adds to JSON lines whose times are fractions of ms


@dataclass(frozen=True)
class Layout:
    """Names of the three columns, and what is known about the time.

    Attributes:
        time: column of the arrival time; where it holds dates, they carry their own unit.
        prompt: column of the prompt length.
        output: column of the output length.
        unit: unit of a numeric time as the format's authors document it; None where nobody does,
            so that the numbers have to decide.
        title: name of the format, for the user.
        rival: unit of another format with the same columns, which the numbers have to rule out.
        keeps_zero: times count from the file's own zero, as written; others count from the first
            request.
        is_named: the user named the time column; its zero is kept where the file starts there.
        block_tokens: tokens of a block of a prompt, as documented; None: by the lengths.
        block_told: likewise, as the file itself says.
        slo_class: column of SLO classes; None where there is none.
    """

    time: str
    prompt: str
    output: str
    unit: TimeUnit | None = "s"
    title: str = "named columns"
    rival: TimeUnit | None = None
    keeps_zero: bool = False
    is_named: bool = False
    block_tokens: int | None = None
    block_told: int | None = None
    slo_class: str | None = None

    @property
    def columns(self) -> tuple[str, str, str]:
        """The three names in the order time, prompt, output."""
        return self.time, self.prompt, self.output


@dataclass(frozen=True)
class KnownLayout:
    """A layout, and the further columns of which a file must have one to be of this kind."""

    layout: Layout
    marks: tuple[str, ...] = ()


_MOONCAKE: Final = ("timestamp", "input_length", "output_length")
# Units as documented: Mooncake, FAST25-release/README; Qwen-Bailian, README of
# qwen-bailian-usagetraces-anon; BurstGPT, README ("seconds from 0:00:00 on the first day");
# splitwise-sim and Vidur, their trace generators; ServeGen, README (seconds); vLLM, `start_times`
# of `vllm bench serve --save-detailed` (perf_counter). Blocks of prompts: 512 tokens in Mooncake's
# README, 16 in Qwen-Bailian's.
KNOWN: Final[dict[str, KnownLayout]] = {
    "biscale": KnownLayout(
        Layout("arrival_s", "prompt_tokens", "output_tokens", title="biscale-env", keeps_zero=True)
    ),
    "azure": KnownLayout(
        Layout("TIMESTAMP", "ContextTokens", "GeneratedTokens", None, "Azure 2023/2024")
    ),
    "qwen-bailian": KnownLayout(
        Layout(*_MOONCAKE, "s", "Qwen-Bailian", rival="ms", block_tokens=16),
        ("chat_id", "parent_chat_id", "turn", "type"),
    ),
    "mooncake": KnownLayout(Layout(*_MOONCAKE, "ms", "Mooncake", rival="s", block_tokens=512)),
    "burstgpt": KnownLayout(
        Layout("Timestamp", "Request tokens", "Response tokens", "s", "BurstGPT")
    ),
    "splitwise-sim": KnownLayout(
        Layout("arrival_timestamp", "prompt_size", "token_size", "s", "splitwise-sim")
    ),
    "vidur": KnownLayout(
        Layout("arrived_at", "num_prefill_tokens", "num_decode_tokens", "s", "Vidur")
    ),
    "servegen": KnownLayout(
        Layout("timestamp", "input_tokens", "output_tokens", "s", "ServeGen"),
        ("request_id", "client_id", "reason_tokens", "answer_tokens"),
    ),
    "vllm-bench": KnownLayout(
        Layout("start_times", "input_lens", "output_lens", "s", "vllm bench serve")
    ),
}
# other spellings, each list in the order of preference; the numbers decide about the unit
TIMES: Final = (
    "arrival_s", "arrival_ms", "arrival_us", "arrival_ns", "arrival_time", "arrival_timestamp",
    "arrived_at", "timestamp", "request_timestamp", "request_time", "start_time", "start_times",
    "arrival", "arrival_time_s", "arrival_time_ms", "timestamp_s", "timestamp_ms", "timestamp_us",
    "timestamp_ns", "request_start_ns", "start_time_s", "start_time_ms", "created_at", "ts",
    "created",
)  # fmt: skip
PROMPTS: Final = (
    "prompt_tokens", "input_tokens", "input_length", "input_len", "input_lens", "prompt_length",
    "prompt_len", "prompt_size", "num_prefill_tokens", "num_prompt_tokens", "num_input_tokens",
    "context_tokens", "request_tokens", "input_sequence_length", "isl",
)  # fmt: skip
OUTPUTS: Final = (
    "output_tokens", "completion_tokens", "output_length", "output_len", "output_lens",
    "generated_tokens", "response_tokens", "num_decode_tokens", "num_output_tokens",
    "num_generated_tokens", "token_size", "output_size", "completion_length", "completion_len",
    "generation_tokens", "output_sequence_length", "osl",
)  # fmt: skip
OPTIONS: Final = "--time-column, --prompt-column and --output-column"
SHOWN: Final = ("azure", "mooncake", "biscale")  # in the message about a header that fits none


def plain(name: str) -> str:
    """A column name without case, spaces and punctuation: all that spellings differ in."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_layout(
    path: Path,
    header: Sequence[str],
    time_column: str | None = None,
    prompt_column: str | None = None,
    output_column: str | None = None,
    class_column: str | None = None,
    **_: object,
) -> Layout:
    """Choose the columns.

    Those that were named, the rest from the first known layout whose columns the file has (in any
    case, with any punctuation), else from the usual spellings.

    Args:
        path: file, for errors.
        header: column names of the file.
        time_column: name of the arrival time column.
        prompt_column: name of the prompt length column.
        output_column: name of the output length column.
        class_column: name of the column of SLO classes; None takes `SLO_CLASS`, if it is there.

    Raises:
        BiscaleError: a column is not there, or the header fits no known layout.
    """
    named = (time_column, prompt_column, output_column)
    own_names = {plain(name): name for name in reversed(header)} | {name: name for name in header}
    for name in (*named, class_column):
        if name and name not in header:
            raise BiscaleError(
                f"{path}, line 1: there is no column '{name}'; the columns are {_few(header)}"
            )
    layout = _known_layout(own_names, named) or _usual_layout(own_names, named)
    if layout is None:
        raise BiscaleError(f"{path}, line 1: {_header_fault(header, own_names)}")
    if len(set(layout.columns)) < 3 or any(header.count(c) > 1 for c in layout.columns):
        raise BiscaleError(
            f"{path}, line 1: time, prompt and output must be three different columns, each named "
            "once"
        )
    own_class = own_names.get(SLO_CLASS) or own_names.get(plain(SLO_CLASS))
    return replace(layout, slo_class=class_column or own_class)


def _known_layout(
    own_names: dict[str, str], named: tuple[str | None, str | None, str | None]
) -> Layout | None:
    def own(name: str) -> str | None:
        return own_names.get(name) or own_names.get(plain(name))

    for known in KNOWN.values():
        found = [n or own(column) for n, column in zip(named, known.layout.columns, strict=True)]
        if None in found or (known.marks and not any(own(mark) for mark in known.marks)):
            continue
        time, prompt, output = (str(name) for name in found)
        base = known.layout
        if named[0] and plain(named[0]) != plain(base.time):
            return Layout(time, prompt, output, None, is_named=True)
        return replace(base, time=time, prompt=prompt, output=output)
    return None


def _usual_layout(
    own_names: dict[str, str], named: tuple[str | None, str | None, str | None]
) -> Layout | None:
    found = [
        name or next((own_names[n] for n in _spellings(usual) if n in own_names), None)
        for name, usual in zip(named, (TIMES, PROMPTS, OUTPUTS), strict=True)
    ]
    if None in found:
        return None
    time, prompt, output = (str(name) for name in found)
    title = "named columns" if all(named) else f"columns {time}, {prompt}, {output}"
    return Layout(time, prompt, output, None, title, is_named=named[0] is not None)


def _spellings(usual: Sequence[str]) -> list[str]:
    """Plain forms of usual names, those of a column of a request behind them."""
    return [*(plain(name) for name in usual), *(f"request{plain(name)}" for name in usual)]


def _few(header: Sequence[str]) -> str:
    shown = ", ".join(" ".join(str(name).split()) for name in header)  # in one line
    return shown if len(shown) <= 160 else f"{shown[:160]}..."


def _header_fault(header: Sequence[str], own_names: dict[str, str]) -> str:
    lengths = [
        next((own_names[plain(n)] for n in usual if plain(n) in own_names), None)
        for usual in (PROMPTS, OUTPUTS)
    ]
    times = [n for n in TIMES if plain(n) in own_names]
    text = ",".join(" ".join(str(name).split()) for name in header)  # in one line
    if all(lengths) and not times:
        return (
            f"the columns {_few(header)} hold lengths but no arrival time: name its column with "
            "--time-column, or make arrivals with 'biscale traces generate --lengths'"
        )
    if header and all(re.fullmatch(r"[-+\d.:TZ eE]*", str(name)) for name in header):
        text = f"{text[:80]}' (a row, no header?)" if text else text + "'"
    else:
        text = f"{text[:120]}'"
    expected = " or ".join(",".join(KNOWN[name].layout.columns) for name in SHOWN)
    return (
        f"wrong header '{text}; expected {expected} or another known format, or name the columns "
        f"with {OPTIONS}"
    )
