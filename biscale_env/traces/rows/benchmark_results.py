"""Results of AIPerf and GenAI-Perf, record by record: when a request was sent and how long it was.

AIPerf writes one record per request (``profile_export.jsonl``); its other files, and those of
GenAI-Perf, hold summaries or texts, which are no trace.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.checks import Where
from biscale_env.traces.prompts.raw_blocks import RawBlocks
from biscale_env.traces.rows.layouts import Layout
from biscale_env.traces.rows.raw_columns import ChosenRow, RawColumns

AIPERF: Final = Layout(
    "request_start_ns", "input_sequence_length", "output_sequence_length", "ns", "AIPerf"
)

# of one run of a chat, and of the chat that it repeats
SESSION_KEYS: Final = ("x_correlation_id", "conversation_id")


def is_aiperf_record(row: Any) -> bool:
    """Whether a JSON object is a record of one request by AIPerf."""
    return (
        isinstance(row, Mapping)
        and isinstance(row.get("metadata"), Mapping)
        and "request_start_ns" in row["metadata"]
        and ("metrics" in row or "error" in row)
    )


def benchmark_columns(records: list[Mapping[str, Any]], where: Where) -> RawColumns:
    """Columns of AIPerf records; warm-up requests are left out.

    A request with an error, or cancelled, has failed; its lengths may be missing (NaN).

    Args:
        records: the records, in the order of the file, which is that of their ends.
        where: names one of them.

    Raises:
        BiscaleError: a record says nothing about when it was sent.
    """
    kept, times, prompts, outputs, failed, sessions = [], [], [], [], [], []
    for i, record in enumerate(records):
        about = record.get("metadata") or {}
        if about.get("benchmark_phase") == "warmup":
            continue
        sent_ns = about.get("request_start_ns")
        if not isinstance(sent_ns, int) or not 0 <= sent_ns < 2**63:
            raise BiscaleError(f"{where(i)}: request_start_ns is missing or not a number")
        metrics = record.get("metrics") or {}
        kept.append(i)
        times.append(sent_ns)
        prompts.append(_value(metrics, AIPERF.prompt))
        output = _value(metrics, AIPERF.output)
        outputs.append(_value(metrics, "output_token_count") if np.isnan(output) else output)
        failed.append(bool(record.get("error")) or bool(about.get("was_cancelled")))
        sessions.append(next((about[k] for k in SESSION_KEYS if about.get(k) is not None), i))
    order = np.argsort(np.array(times, dtype=np.int64), kind="stable")
    return RawColumns(
        np.array(times, dtype=np.int64)[order],
        np.array(prompts, dtype=float)[order],
        np.array(outputs, dtype=float)[order],
        ChosenRow(where, np.array(kept, dtype=np.intp)[order]),
        AIPERF,
        np.array(failed, dtype=bool)[order],
        len(records) - len(kept),
        _chats(np.array(sessions, dtype=object)[order]),
    )


def _chats(sessions: NDArray[Any]) -> RawBlocks | None:
    """Sessions of the records; None where each is a request by itself."""
    if len(set(sessions.tolist())) == sessions.size:
        return None
    return RawBlocks(None, np.zeros(sessions.size + 1, dtype=np.int64), sessions)


def _value(metrics: Mapping[str, Any], name: str) -> float:
    found = metrics.get(name)
    value = found.get("value") if isinstance(found, Mapping) else found
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    return as_float(value) if fine else float("nan")


def as_float(value: Any) -> float:
    """A JSON number as a float; infinite where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def refuse_summary(path: Path, document: Mapping[str, Any]) -> None:
    """Say of a benchmark's file without requests which one has them.

    Raises:
        BiscaleError: it holds a summary, or requests without lengths or times.
    """
    if "experiments" in document:
        raise BiscaleError(
            f"{path} is a profile of GenAI-Perf: it holds texts but no token counts; use "
            "profile_export.jsonl of AIPerf, its successor"
        )
    if "request_throughput" not in document:
        return
    if "start_times" not in document and "input_lens" in document:
        raise BiscaleError(
            f"{path} is a benchmark's result without start_times: it does not say when requests "
            "were sent; newer versions of 'vllm bench serve --save-detailed' write them"
        )
    if "input_lens" not in document:
        raise BiscaleError(
            f"{path} is a benchmark's summary without its requests: use profile_export.jsonl of "
            "AIPerf, or --save-result --save-detailed of 'vllm bench serve'"
        )
