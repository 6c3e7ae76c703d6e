"""Windows of a long trace: the same streamed as from memory, with their days."""

import tracemalloc
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.traces import (
    ReadingOptions,
    Trace,
    read_trace,
    read_windows,
    windows_of,
    write_trace,
)

DAY_S = 86400.0


def made(n, span_s, seed=0):
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0, span_s, n))
    return Trace("long", times, rng.integers(1, 900, n), rng.integers(1, 90, n), "test")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.floats(1, 60), st.floats(1, 3), st.floats(0, 20))
def test_windows_are_those_that_the_definition_says(n, length_s, factor, first_s):
    trace = made(n, 200.0, seed=n)
    every_s = length_s * factor
    if first_s + length_s > trace.duration_s:
        with pytest.raises(BiscaleError, match="not one whole window"):
            windows_of(trace, length_s, every_s, first_s)
        return
    found = windows_of(trace, length_s, every_s, first_s)
    assert found[-1].start_s + length_s <= trace.duration_s + 1e-6
    assert found[-1].start_s + length_s + every_s > trace.duration_s - 1e-6
    for k, window in enumerate(found):
        start_s = first_s + k * every_s
        inside = (trace.arrival_s >= start_s) & (trace.arrival_s < start_s + length_s)
        assert window.trace.duration_s == pytest.approx(length_s)
        assert window.trace.prompt_tokens[: inside.sum()].tolist() == (
            trace.prompt_tokens[inside].tolist()
        )


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize(("length_s", "every_s", "first_s"), [(60, None, 0), (45, 700, 30)])
def test_streamed_windows_are_those_of_the_whole_trace(
    tmp_path, monkeypatch, suffix, length_s, every_s, first_s
):
    monkeypatch.setattr("biscale_env.traces.rows.raw_columns.BLOCK_BYTES", 2000)
    monkeypatch.setattr("biscale_env.traces.rows.raw_columns.BLOCK_ROWS", 50)
    path = write_trace(made(3000, 5000.0), tmp_path / f"long{suffix}")
    whole = windows_of(read_trace(path), length_s, every_s, first_s)
    streamed = list(read_windows(path, length_s, every_s, first_s))
    assert [w.start_s for w in streamed] == [w.start_s for w in whole]
    for one, other in zip(streamed, whole, strict=True):
        assert one.trace.prompt_tokens.tolist() == other.trace.prompt_tokens.tolist()
        np.testing.assert_allclose(one.trace.arrival_s, other.trace.arrival_s, atol=1e-9)
        assert (one.trace.duration_s, one.label) == (other.trace.duration_s, other.label)


def test_days_are_calendar_days_where_there_are_dates(tmp_path):
    hours = np.arange(0, 60, 0.5)
    stamps = [datetime(2024, 5, 10, 18, tzinfo=UTC) + timedelta(hours=h) for h in hours]
    rows = "".join(f"{stamp},{k + 1},5\n" for k, stamp in enumerate(stamps))
    (tmp_path / "week.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    found = list(read_windows(tmp_path / "week.csv", 3600.0, 6 * 3600.0))
    assert [(w.day, w.label) for w in found] == [
        (0, "2024-05-10"),
        *[(1, "2024-05-11")] * 4,
        *[(2, "2024-05-12")] * 4,
        (3, "2024-05-13"),
    ]
    assert [w.trace.prompt_tokens[0] for w in found] == [1 + 12 * k for k in range(10)]
    part = ReadingOptions(start="2024-05-11 00:00", stop="2024-05-12")
    second = list(read_windows(tmp_path / "week.csv", 3600.0, 6 * 3600.0, options=part))
    assert [w.trace.prompt_tokens[0] for w in second] == [13, 25, 37, 49]
    assert [(w.day, w.label) for w in second] == [(1, "2024-05-11")] * 4
    days = [w.label for w in windows_of(made(100, 3 * DAY_S), 100.0, DAY_S, 3600.0)]
    assert days == ["day 0", "day 1", "day 2"]


def test_a_long_file_is_not_held_in_memory(tmp_path):
    n = 600_000
    path = tmp_path / "long.csv"
    with path.open("w") as file:
        file.write("arrived_at,num_prefill_tokens,num_decode_tokens\n")
        file.writelines(f"{k},{1 + k % 900},{1 + k % 90}\n" for k in range(n))
    tracemalloc.start()
    found = sum(len(w.trace) for w in read_windows(path, 100.0, 10_000.0))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == 60 * 100
    assert most < 8e6  # the columns alone are 9.6 MB


@pytest.mark.parametrize(
    ("given", "words"),
    [((0.0,), "positive length"), ((10.0, 5.0), "that far apart"), ((10.0, None, -1.0), "from -1")],
)
def test_impossible_windows(tmp_path, given, words):
    with pytest.raises(BiscaleError, match=words):
        windows_of(made(10, 100.0), *given)
    path = write_trace(made(10, 100.0), tmp_path / "t.csv")
    with pytest.raises(BiscaleError, match=words):
        list(read_windows(path, *given))
    with pytest.raises(BiscaleError, match="not one whole window of 500 s"):
        list(read_windows(path, 500.0))
