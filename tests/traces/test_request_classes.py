"""SLO classes of requests: read, kept by whatever chooses requests, and matched with an SLO."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from biscale_env.config import load_slo
from biscale_env.core.errors import BiscaleError
from biscale_env.traces import Trace, load_file, read_trace, windows_of, write_trace
from biscale_env.traces.request_classes import RequestClasses

NAMES = ["interactive", "batch", None, "batch", "interactive", ""]


def trace_of(names=tuple(NAMES)):
    n = len(names)
    times, lengths = 0.5 * np.arange(n), 100 + np.arange(n)
    return Trace("t", times, lengths, lengths, "test", classes=RequestClasses.of(names))


def test_classes_are_numbered_as_they_appear():
    classes = trace_of().classes
    assert classes.names == ("interactive", "batch")
    assert classes.codes.tolist() == [0, 1, -1, 1, 0, -1]
    assert classes.each().tolist() == [name or "none" for name in NAMES]
    assert RequestClasses.of([" a ", "a", "none"]).codes.tolist() == [0, 0, -1]


@settings(deadline=None)
@given(some.lists(some.lists(some.sampled_from(["a", "b", "c", ""]), min_size=1), min_size=1))
def test_pieces_joined_are_the_whole(pieces):
    whole = RequestClasses.of([name for piece in pieces for name in piece])
    joined = RequestClasses.joined([RequestClasses.of(piece) for piece in pieces])
    assert joined.each().tolist() == whole.each().tolist()
    assert joined.content() == whole.content()


def test_every_choice_of_requests_keeps_their_classes():
    trace = trace_of()
    assert trace.window(0.5, 1.6).classes.each().tolist() == ["batch", "none", "batch"]
    (window,) = windows_of(trace, 2.0, 2.0)
    assert len(window.trace.classes) == len(window.trace)
    scaled = trace.scaled_to(5 * trace.rate_rps, 0)
    named = dict(zip(trace.prompt_tokens.tolist(), trace.classes.each().tolist(), strict=True))
    told = scaled.classes.each().tolist()
    assert told == [named[p] for p in scaled.prompt_tokens.tolist()]
    assert trace_of(["a"] * 6) != trace_of(["b"] * 6)
    assert trace_of(["a", "b"]) == trace_of(["a", "b"])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_what_was_written_is_read(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(
        "biscale_env.traces.rows.raw_columns.BLOCK_ROWS", 2
    )  # pieces differ in names
    path = write_trace(trace_of(), tmp_path / f"t{suffix}")
    loaded = load_file(path)
    assert loaded.trace.classes.each().tolist() == trace_of().classes.each().tolist()
    assert "SLO classes interactive, batch" in loaded.recognised.sentence()
    part = read_trace(path, start="1s")
    assert part.classes.each().tolist() == ["none", "batch", "interactive", "none"]
    (window,) = windows_of(read_trace(path), 2.0, 9.0)
    assert window.trace.classes.each().tolist()[:2] == ["interactive", "batch"]


def test_another_column_of_classes_and_numbers_for_names(tmp_path):
    rows = [(0.5 * k, 10, 5, k % 2) for k in range(4)]
    path = tmp_path / "t.csv"
    text = "\n".join(",".join(map(str, row)) for row in rows)
    path.write_text("arrival_s,prompt_tokens,output_tokens,priority\n" + text)
    assert read_trace(path).classes is None
    assert read_trace(path, class_column="priority").classes.each().tolist() == list("0101")
    unsorted = path.with_name("u.csv")
    unsorted.write_text("arrival_s,prompt_tokens,output_tokens,slo_class\n2,1,1,b\n0,2,2,a\n")
    assert read_trace(unsorted, sort=True).classes.each().tolist() == ["a", "b"]
    lines = path.with_name("t.json")
    names = ("arrival_s", "prompt_tokens", "output_tokens", "priority")
    lines.write_text(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
    assert read_trace(lines, class_column="priority").classes.each().tolist() == list("0101")
    with pytest.raises(BiscaleError, match="there is no column 'importance'"):
        read_trace(path, class_column="importance")


def test_a_column_that_is_none_of_classes_is_refused():
    with pytest.raises(BiscaleError, match="at most 127 SLO classes, got 200"):
        RequestClasses.of([f"user {k}" for k in range(200)])
    with pytest.raises(BiscaleError, match="classes of 2 requests for 3"):
        Trace("t", np.arange(3.0), [1] * 3, [1] * 3, "", classes=RequestClasses.of(["a", "b"]))


def test_numbers_are_those_of_the_slo():
    slo, classes = load_slo("interactive-batch"), trace_of().classes
    assert slo.class_names == ("none", "interactive", "batch")
    assert classes.numbers(slo, "t").tolist() == [1, 2, 0, 2, 1, 0]
    other = RequestClasses.of(["batch", "bulk"])
    with pytest.raises(BiscaleError, match="t has requests of class 'bulk', but SLO 'interactive-"):
        other.numbers(slo, "t")
    assert other.take([0]).numbers(slo, "t").tolist() == [2]  # nobody of the other is there
