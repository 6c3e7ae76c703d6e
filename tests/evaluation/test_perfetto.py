"""The timeline for Perfetto: what stands in the JSON, held against the run."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from evaluation_synthetic import plausible, requests_of, timeline_of, tiny
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from biscale_env.cli import build
from biscale_env.evaluation.runs.perfetto import COUNTERS, lanes, trace_events
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory

POLICIES = ("max", "mpc")
ALL = (0.0, np.inf)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("perfetto") / "run"
    with RunDirectory(path, {}) as directory:
        for policy in POLICIES:
            directory.add(plausible("prefill", policy, 0, duration_s=60.0), keep_timeline=True)
    return path


def events_of(record, window=ALL):
    return list(trace_events("toy", 1, record.timeline, record.requests, window))


def export(*arguments):
    return CliRunner().invoke(build(), ["export", "perfetto", *map(str, arguments)])


def read(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)["traceEvents"]


def test_the_file_holds_every_iteration_of_every_policy(folder):
    done = export(folder)
    assert done.exit_code == 0, done.output
    events = read(folder / "perfetto.json")
    run = load_run(folder)
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert [name.split()[0] for name in names.values()] == list(POLICIES)
    for pid, run_id in zip(names, run.results["run_id"], strict=True):
        timeline = run.timeline_of(run_id)
        slices = [e for e in events if e["ph"] == "X" and e["pid"] == pid]
        assert len(slices) == timeline["time_s"].size
        assert [e["ts"] for e in slices] == pytest.approx(timeline["time_s"] * 1e6, abs=1e-3)
        assert [e["dur"] for e in slices] == pytest.approx(timeline["duration_s"] * 1e6, abs=1e-3)
        energy_j = sum(e["args"]["energy_j"] for e in slices)
        assert energy_j == pytest.approx(timeline["energy_j"].sum())
        begun = [e for e in events if e["ph"] == "b" and (e["pid"], e["name"]) == (pid, "request")]
        assert len(begun) == run.requests_of(run_id)["arrival_s"].size


def test_every_event_has_what_the_format_requires(folder, tmp_path):
    assert export(folder, "--out", tmp_path / "t.json").exit_code == 0
    open_slices = defaultdict(Counter)
    for event in read(tmp_path / "t.json"):
        assert event["ph"] in "MXCbe"
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            continue
        assert event["ts"] >= 0
        if event["ph"] in "be":
            step = 1 if event["ph"] == "b" else -1
            open_slices[event["id"]][event["name"]] += step
            assert open_slices[event["id"]][event["name"]] in (0, 1)
    assert open_slices
    assert not any(count for names in open_slices.values() for count in names.values())


def test_counters_step_where_the_timeline_does():
    record = tiny()
    record.timeline["freq_effective_mhz"][:] = [1000.0, 1000.0, 1500.0]
    record.timeline["queue_requests"][:] = [0, 2, 2]
    tracks = defaultdict(list)
    for event in events_of(record):
        if event["ph"] == "C":
            tracks[event["name"]].append((event["ts"], event["args"]))
    assert set(tracks) == set(COUNTERS)
    assert [(t, a["effective"]) for t, a in tracks["clock, MHz"]] == [(0.0, 1000), (2e6, 1500)]
    assert tracks["queue, requests"] == [(0.0, {"waiting": 0}), (1e6, {"waiting": 2})]


def test_requests_that_never_ended_and_values_that_are_none():
    requests = requests_of([0.0, 1.0], [0.5, np.nan], [0.9, np.nan], [10, 5], start_s=[0.2, np.nan])
    timeline = timeline_of([0.0], [1.0], [0.0], [np.nan])
    events = list(trace_events("toy", 1, timeline, requests, ALL))
    json.dumps(events, allow_nan=False)
    spans = [(e["ph"], e["name"], e["ts"]) for e in events if e["ph"] in "be"]
    assert spans == [
        ("b", "request", 0.0),
        *[("b", "wait", 0.0), ("e", "wait", 2e5)],
        *[("b", "first token", 2e5), ("e", "first token", 5e5)],
        *[("b", "output", 5e5), ("e", "output", 9e5)],
        ("e", "request", 9e5),
    ]


def test_a_window_cuts_by_the_beginning():
    starts = [e["ts"] for e in events_of(tiny(), (1.0, 2.0)) if e["ph"] == "X"]
    assert starts == [1e6]


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0.01, 5)), min_size=1, max_size=40))
def test_lanes_are_free_of_overlap_and_as_few_as_can_be(spans):
    spans = sorted((a, a + length) for a, length in spans)
    start, end = np.array(spans).T
    lane = lanes(start, end)
    for k in range(lane.max() + 1):
        own = np.flatnonzero(lane == k)
        assert (start[own][1:] >= end[own][:-1] - 1e-9).all()
    depth = max(int(((start <= t) & (end > t + 1e-9)).sum()) for t in start)
    assert lane.max() + 1 <= max(depth, 1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--policy", "agft"), "there are: max, mpc"),
        (("--point", "7"), "has 1 operating points"),
        (("--start", "900"), "no iteration of run"),
    ],
)
def test_mistakes_are_a_sentence(folder, arguments, told):
    done = export(folder, *arguments)
    assert done.exit_code != 0
    assert told in str(done.exception)
    assert "\n" not in str(done.exception)
