"""Windows of a trace by its name: cut once, kept, cut again when anything about them changed."""

import logging
import os
from dataclasses import replace

import numpy as np
import pytest
from block_helpers import with_blocks
from week_of_days import days_of_traffic, write_days

from biscale_env.core.errors import BiscaleError
from biscale_env.traces import (
    ReadingOptions,
    WindowSpacing,
    load_named,
    named_windows,
    read_windows,
    windows_of,
)
from biscale_env.traces import window_cache as cache

PLAN = WindowSpacing.of_text("4min/1d")


@pytest.fixture
def week(tmp_path, monkeypatch):
    """A file of four days, and how often it was streamed."""
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path / "cache"))
    streamed = []

    def counted(*given, **options):
        streamed.append(given[0])
        return read_windows(*given, **options)

    monkeypatch.setattr(cache, "read_windows", counted)
    path = write_days(tmp_path / "week.csv", days_of_traffic((0.5, 1.0, 0.7, 0.3)))
    return path, streamed


def same(found, other):
    assert [(w.start_s, w.day, w.label) for w in found] == [
        (w.start_s, w.day, w.label) for w in other
    ]
    for one, two in zip(found, other, strict=True):
        assert one.trace == two.trace
        assert (one.trace.name, one.trace.source) == (two.trace.name, two.trace.source)


@pytest.mark.parametrize(
    ("text", "length_s", "every_s"),
    [("30min/1d", 1800.0, 86400.0), ("600/2h", 600.0, 7200.0), ("1h/1h", 3600.0, 3600.0)],
)
def test_a_plan_is_written_length_over_distance(text, length_s, every_s):
    assert WindowSpacing.of_text(text) == WindowSpacing(length_s=length_s, every_s=every_s)
    assert WindowSpacing.model_validate(text).every_s == every_s


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("30min", "LENGTH/EVERY"),
        ("1/2/3", "LENGTH/EVERY"),
        ("1d/30min", "that far apart"),
        ("0/1d", "positive length"),
        ("soon/1d", "--windows takes a time"),
    ],
)
def test_a_plan_that_cannot_be_is_one_sentence(text, words):
    with pytest.raises(BiscaleError, match=words):
        WindowSpacing.of_text(text)


def test_a_file_is_streamed_once(week):
    path, streamed = week
    first = named_windows(str(path), PLAN)
    assert [w.label for w in first] == ["2024-05-10", "2024-05-11", "2024-05-12", "2024-05-13"]
    assert [len(w.trace) for w in first] == [len(t) for t in days_of_traffic((0.5, 1.0, 0.7, 0.3))]
    same(named_windows(str(path), PLAN), first)
    assert len(streamed) == 1
    assert len(named_windows(str(path), WindowSpacing.of_text("2min/1d"))) == 4
    afternoon = ReadingOptions(start="2min")
    part = named_windows(str(path), PLAN, afternoon)
    assert len(part[0].trace) < len(first[0].trace)
    assert len(streamed) == 3


def test_what_was_cut_is_told_while_it_is_cut_and_that_it_was_kept(week, caplog):
    path, _ = week
    with caplog.at_level(logging.INFO, "biscale_env.traces"):
        named_windows(str(path), PLAN)
        told = [record.getMessage() for record in caplog.records]
        assert "times are dates" in told[0]
        assert len(told) == 5
        assert "2024-05-12, 172800 to 173040 s of the trace" in told[3]
        named_windows(str(path), PLAN)
    assert "4 windows of 240 s every 86400 s, cut before" in caplog.records[-1].getMessage()


def test_a_changed_file_is_cut_again(week):
    path, streamed = week
    first = named_windows(str(path), PLAN)
    write_days(path, days_of_traffic((0.9, 1.0, 0.7, 0.3)))
    assert named_windows(str(path), PLAN)[0].trace != first[0].trace
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    named_windows(str(path), PLAN)
    assert len(streamed) == 3


@pytest.mark.parametrize("damage", ["cut", "gone", "other", "index"])
def test_a_damaged_cache_is_cut_again(week, damage):
    path, streamed = week
    first = named_windows(str(path), PLAN)
    files = sorted((cache.user_cache.cache_root() / cache.FOLDER).rglob("*.npz"))
    if damage == "cut":
        files[1].write_bytes(files[1].read_bytes()[:300])
    elif damage == "gone":
        files[1].unlink()
    elif damage == "other":
        files[1].write_bytes(files[2].read_bytes())
    else:
        (files[0].parent / cache.INDEX).write_text('[{"start_s": 1}]')
    same(named_windows(str(path), PLAN), first)
    assert len(streamed) == 2
    same(named_windows(str(path), PLAN), first)
    assert len(streamed) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(week, monkeypatch):
    path, streamed = week
    monkeypatch.setenv("BISCALE_CACHE", "/proc/nothing/here")
    found = named_windows(str(path), PLAN)
    same(named_windows(str(path), PLAN), found)
    assert len(streamed) == 2


def test_windows_without_a_request_are_left_out_and_said(week, caplog):
    path, streamed = week
    plan = WindowSpacing.of_text("2min/6h")
    with caplog.at_level(logging.INFO, "biscale_env.traces"):
        found = named_windows(str(path), plan)
    assert [w.start_s for w in found] == [0.0, 86400.0, 172800.0, 259200.0]
    assert "12 of 16 windows have no request: left out" in caplog.text
    same(named_windows(str(path), plan), found)
    assert len(streamed) == 1
    with pytest.raises(BiscaleError, match="no window of 60 s has a request"):
        named_windows(str(path), WindowSpacing.of_text("1min/1d"), ReadingOptions(start="1h"))


def test_a_file_that_has_to_be_sorted_is_read_whole(week):
    path, streamed = week
    plain = named_windows(str(path), PLAN)
    head, *rows = path.read_text().splitlines()
    shuffled = np.random.default_rng(0).permutation(rows[1:]).tolist()
    path.write_text("\n".join([head, rows[0], *shuffled]) + "\n")
    found = named_windows(str(path), PLAN, ReadingOptions(sort=True))
    assert [(w.start_s, w.label) for w in found] == [(w.start_s, w.label) for w in plain]
    for one, two in zip(found, plain, strict=True):
        np.testing.assert_allclose(one.trace.arrival_s, two.trace.arrival_s, atol=1e-6)
        assert sorted(one.trace.prompt_tokens) == sorted(two.trace.prompt_tokens)
    part = named_windows(str(path), PLAN, ReadingOptions(sort=True, start="1d"))
    assert [w.label for w in part] == ["2024-05-11", "2024-05-12", "2024-05-13"]
    assert len(streamed) == 1


def test_a_generated_trace_has_windows_too():
    plan = WindowSpacing.of_text("5min/2h")
    found = named_windows("azure-conv-diurnal", plan)
    same(found, windows_of(load_named("azure-conv-diurnal"), 300.0, 7200.0))
    assert {w.label for w in found} == {"day 0"}


def test_what_prompts_share_is_kept_too(week, monkeypatch):
    path, _ = week
    contents = [[k % 3, k % 2] for k in range(5000)]

    def with_shared_blocks(*given, **options):
        for window in read_windows(*given, **options):
            shared = with_blocks(window.trace, contents[: len(window.trace)], 64)
            yield replace(window, trace=shared)

    monkeypatch.setattr(cache, "read_windows", with_shared_blocks)
    first = named_windows(str(path), PLAN)
    monkeypatch.setattr(cache, "read_windows", lambda *_, **__: pytest.fail("streamed again"))
    found = named_windows(str(path), PLAN)
    same(found, first)
    for one, two in zip(found, first, strict=True):
        assert one.trace.blocks.ids.tolist() == two.trace.blocks.ids.tolist()
        assert one.trace.blocks.n_ids == two.trace.blocks.n_ids
