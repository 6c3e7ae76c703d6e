"""The run directory: whole or absent, resumable, faithful."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from evaluation_synthetic import POLICIES, SLO, plausible, requests_of, tiny
from slow_values import slow

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.runs import run_files
from biscale_env.evaluation.runs.blocks import window_totals
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.evaluation.stats.class_metrics import slo_of
from biscale_env.evaluation.stats.metrics import results_row
from biscale_env.traces import Trace

CONFIG = {"scenario": {"load": 0.75, "policies": ("max", "mpc")}, "slo": SLO, "seeds": np.arange(2)}


def visible(path):
    """Names in a run directory, hidden leftovers included; the lock always stays."""
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*"))
    return [name for name in names if Path(name).name != run_files.LOCK]


def test_round_trip(tmp_path):
    records = [plausible("prefill", p, s, duration_s=40.0) for p in ("mpc", "max") for s in (0, 1)]
    with RunDirectory(tmp_path / "run", CONFIG) as run:
        rows = [run.add(record) for record in records]
    opened = load_run(tmp_path / "run")
    assert opened.results["policy"].tolist() == ["max", "max", "mpc", "mpc"]
    for record, row in zip(records, rows, strict=True):
        stored = opened.row(record.run_id)
        for name, value in row.items():
            assert stored[name] == pytest.approx(value, nan_ok=True), name
        requests, timeline = opened.requests_of(record.run_id), opened.timeline_of(record.run_id)
        for name in record.requests:
            assert requests[name] == pytest.approx(record.requests[name], rel=1e-6), name
        for name in record.timeline:
            assert timeline[name] == pytest.approx(record.timeline[name], rel=1e-6), name
        assert slo_of(stored) == SLO
    assert opened.config["scenario"]["policies"] == ["max", "mpc"]
    assert opened.config["slo"]["ttft_s"] == 0.6
    assert len(opened.requests) == sum(r.requests["arrival_s"].size for r in records)
    assert set(opened.timelines["run_id"]) == {r.run_id for r in records}


def test_row_group_of_each_run_can_be_read_alone(tmp_path):
    with RunDirectory(tmp_path, {}) as run:
        for policy in POLICIES:
            run.add(plausible("decode", policy, duration_s=20.0))
    with pq.ParquetFile(tmp_path / run_files.TIMELINES) as file:
        assert set(run_files.row_groups(file)) == {
            plausible("decode", p, duration_s=20.0).run_id for p in POLICIES
        }


def test_directory_holds_exactly_the_promised_files(tmp_path):
    inputs = {"trace a": "1" * 64}
    with RunDirectory(tmp_path, {}, seeds={"workload": [0]}, inputs=inputs) as run:
        run.add(tiny())
    expected = [
        *run_files.TABLES,
        run_files.RESULTS,
        run_files.SUMMARY,
        run_files.CONFIG,
        run_files.PROVENANCE,
        run_files.PARTS,
    ]
    assert visible(tmp_path) == sorted(expected)
    assert pd.read_csv(tmp_path / run_files.SUMMARY).columns[0] == "phase"
    provenance = json.loads((tmp_path / run_files.PROVENANCE).read_text())
    assert provenance["seeds"] == {"workload": [0]}
    assert provenance["packages"]["numpy"] == np.__version__
    assert provenance["sha256"] == inputs
    assert provenance["command"]
    assert provenance["time_utc"].endswith("+00:00")


def test_requests_and_timelines_may_be_left_out(tmp_path):
    with RunDirectory(tmp_path, {}) as run:
        run.add(
            plausible("prefill", duration_s=400.0, workload_s=400.0),
            keep_timeline=False,
            keep_requests=False,
        )
    opened = load_run(tmp_path)
    run_id = opened.results["run_id"].iloc[0]
    assert opened.timeline_of(run_id) is None
    assert opened.latencies(run_id, "ttft") is None
    assert np.isnan(opened.summary()["ttft_p99_s_ci_low"].iloc[0])
    assert opened.summary()["attainment_ci_low"].iloc[0] < 1
    assert opened.timelines.empty


@pytest.mark.slow
def test_interrupt_keeps_finished_rows_and_resume_skips_them(tmp_path):
    first, second = tiny(workload_seed=0), tiny(workload_seed=1)

    def interrupted():
        with RunDirectory(tmp_path / "r", CONFIG) as run:
            run.add(first)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert load_run(tmp_path / "r").results["run_id"].tolist() == [first.run_id]
    with RunDirectory(tmp_path / "r", CONFIG, resume=True) as run:
        assert run.has(first.key)
        assert not run.has(second.key)
        run.add(second)
    assert load_run(tmp_path / "r").results["workload_seed"].tolist() == [0, 1]
    assert len(json.loads((tmp_path / "r" / run_files.PROVENANCE).read_text())["earlier"]) == 1


def test_killed_before_merging_is_resumed_from_its_parts(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    run.add(tiny())
    (tmp_path / run_files.PARTS / ".half").mkdir()
    del run  # no merge: the process has gone
    again = RunDirectory(tmp_path, CONFIG, resume=True)
    assert again.has(tiny().key)
    again.merge()
    assert len(load_run(tmp_path).results) == 1
    assert visible(tmp_path / run_files.PARTS) == []


def test_part_that_fails_half_way_is_absent(tmp_path, monkeypatch):
    with RunDirectory(tmp_path, {}) as run:
        run.add(tiny(workload_seed=0))
        monkeypatch.setattr(
            pq, "write_table", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
        )
        with pytest.raises(OSError, match="disk full"):
            run.add(tiny(workload_seed=1))
        monkeypatch.undo()
        assert not run.has(tiny(workload_seed=1).key)
        assert (
            len(visible(tmp_path / run_files.PARTS))
            == len([*run_files.TABLES, run_files.RESULTS]) + 1
        )
    assert load_run(tmp_path).results["workload_seed"].tolist() == [0]


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["to_parquet", "to_csv"])
def test_merge_that_fails_half_way_leaves_the_old_files_whole(tmp_path, monkeypatch, broken):
    with RunDirectory(tmp_path, {}) as run:
        run.add(tiny(workload_seed=0))
    before = {
        name: (tmp_path / name).read_bytes() for name in (run_files.RESULTS, run_files.SUMMARY)
    }
    run = RunDirectory(tmp_path, {}, resume=True)
    run.add(tiny(workload_seed=1))

    def fail(self, path, **_):
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        run.merge()
    monkeypatch.undo()
    assert (tmp_path / run_files.SUMMARY).read_bytes() == before[run_files.SUMMARY]
    if broken == "to_parquet":
        assert (tmp_path / run_files.RESULTS).read_bytes() == before[run_files.RESULTS]
    assert not [name for name in visible(tmp_path) if name.startswith(".")]
    run.merge()
    assert load_run(tmp_path).results["workload_seed"].tolist() == [0, 1]
    assert len(load_run(tmp_path).summary()) == 1
    assert len(load_run(tmp_path).windows["run_id"].unique()) == 2


def test_adding_a_run_again_replaces_it(tmp_path):
    with RunDirectory(tmp_path, {}) as run:
        run.add(tiny())
    with RunDirectory(tmp_path, {}, resume=True) as run:
        run.add(tiny(totals={"energy_j": 900.0}))
    opened = load_run(tmp_path)
    assert opened.results["energy_j"].tolist() == [900.0]
    assert len(opened.requests) == 3


def test_nothing_finished_leaves_no_results(tmp_path):
    with RunDirectory(tmp_path, {}):
        pass
    assert not (tmp_path / run_files.RESULTS).exists()
    with pytest.raises(BiscaleError, match=r"holds no results\.parquet"):
        load_run(tmp_path)


def test_points_that_cannot_be_served_outlive_interruption_and_resume(tmp_path):
    point = {
        "scenario": "code",
        "phase": "prefill",
        "slo": "biscale",
        "load": 0.5,
        "tp": 4,
        "dtype": "bf16",
    }
    point["reason"] = "even 0.1 req/s, at max clock, misses"

    def interrupted():
        with RunDirectory(tmp_path, CONFIG) as run:
            run.name_infeasible([point])
            run.add(tiny())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert load_run(tmp_path).infeasible == [point]
    with RunDirectory(tmp_path, CONFIG, resume=True) as run:
        run.add(tiny(policy="mpc"))
    assert load_run(tmp_path).infeasible == [point]
    assert len(load_run(tmp_path).results) == 2


def test_results_of_an_older_version_are_refused_in_a_sentence(tmp_path):
    with RunDirectory(tmp_path, CONFIG) as run:
        run.add(tiny())
    results = tmp_path / run_files.RESULTS
    pd.read_parquet(results).drop(columns="target").to_parquet(results)
    with pytest.raises(BiscaleError, match="'target': an older version wrote it"):
        load_run(tmp_path)


def test_resume_may_add_policies_but_not_change_them(tmp_path):
    first = CONFIG | {"policies": {"prefill": [("max", "max"), ("mine", "mpc")]}}
    RunDirectory(tmp_path, first)
    more = CONFIG | {"policies": {"prefill": [("max", "max"), ("agent", "agent")]}}
    RunDirectory(tmp_path, more, resume=True)
    kept = yaml.safe_load((tmp_path / run_files.CONFIG).read_text())
    assert kept["policies"] == {"prefill": [["max", "max"], ["mine", "mpc"], ["agent", "agent"]]}
    RunDirectory(tmp_path, first, resume=True)
    other = CONFIG | {"policies": {"prefill": [("mine", "slack")]}}
    with pytest.raises(BiscaleError, match="'mine' stands for two things"):
        RunDirectory(tmp_path, other, resume=True)
    with pytest.raises(BiscaleError, match="policies"):
        RunDirectory(tmp_path, CONFIG | {"policies": {"decode": []}}, resume=True)


def test_resume_with_another_configuration_names_what_changed(tmp_path):
    RunDirectory(tmp_path, CONFIG)
    changed = CONFIG | {"scenario": {"load": 0.9, "policies": ["max", "mpc"]}}
    with pytest.raises(BiscaleError, match=r"'scenario\.load' was 0\.75 and is now 0\.9"):
        RunDirectory(tmp_path, changed, resume=True)
    RunDirectory(tmp_path, CONFIG, resume=True)


def test_of_a_list_of_points_the_changed_value_alone_is_told(tmp_path):
    points = [{"load": 0.5, "trace": "a"}, {"load": 0.9, "trace": "a"}]
    RunDirectory(tmp_path, CONFIG | {"points": points})
    points[1]["load"] = 0.8
    told = r"cannot resume .*: 'points\[1\]\.load' was 0\.9 and is now 0\.8; resume with the same"
    with pytest.raises(BiscaleError, match=told):
        RunDirectory(tmp_path, CONFIG | {"points": points}, resume=True)


def test_bad_places_are_refused_and_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BiscaleError, match="is a file"):
        RunDirectory(tmp_path / "file", {})
    with pytest.raises(BiscaleError, match="not empty and not a run directory"):
        RunDirectory(tmp_path, {})
    with pytest.raises(BiscaleError, match="cannot make the run directory"):
        RunDirectory(tmp_path / "file" / "below", {})
    RunDirectory(tmp_path / "run", {})
    with pytest.raises(BiscaleError, match="add --resume"):
        RunDirectory(tmp_path / "run", {})
    assert visible(tmp_path) == [
        "file",
        "run",
        "run/config.yaml",
        "run/parts",
        "run/provenance.json",
    ]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("copies", [((0.0, 1.0),), ((0.0, 0.4), (77.0, 0.4), (290.0, 0.2))])
def test_windows_add_up_to_the_run(phase, copies):
    record = plausible(phase, "mpc", 3, duration_s=400.0, workload_s=400.0, copies=copies)
    windows, row = window_totals(record), results_row(record)
    assert windows["energy_j"].sum() == pytest.approx(row["energy_j"])
    assert windows["n_counted"].sum() == pytest.approx(row["n_counted"])
    assert (windows["n_counted"] - windows["n_met"]).sum() == pytest.approx(row["n_violations"])
    assert windows["output_tokens"].sum() == pytest.approx(row["output_tokens"])
    assert windows["begin_s"] == pytest.approx([0.0, 400 / 3, 800 / 3])  # the run ends at 460 s
    assert windows["copies"] == pytest.approx(np.full(3, 1.0 if len(copies) == 1 else 1 / 0.36))


def test_a_copy_is_given_back_to_the_windows_of_its_trace():
    """Half of the requests stem from 180 s earlier: one and a half windows, around the end."""
    arrival = np.array([60.0, 180.0, 300.0, 420.0])
    requests = requests_of(arrival, arrival + 0.1, arrival + 0.1, np.ones(4))
    requests = {name: values[:1] for name, values in requests.items()}
    record = tiny(
        requests=requests,
        totals={"energy_j": 600.0, "duration_s": 480.0},
        workload_s=480.0,
        copies=((0.0, 0.5), (180.0, 0.5)),
    )
    windows = window_totals(record)
    # 180 s before window 0 (of four of 120 s) is from the middle of window 2 to that of window 3
    assert windows["n_counted"] == pytest.approx([0.5, 0.0, 0.25, 0.25])
    assert windows["copies"] == pytest.approx(np.full(4, 2.0))


def test_a_workload_knows_the_copies_of_its_trace():
    """What the trace says it puts together is what it puts together."""
    arrival = np.arange(100.0)
    trace = Trace("t", arrival, np.full(100, 5), np.full(100, 5), "made", duration_s=100.0)
    copies = trace.copies_at(2.5, 7)
    assert [share for _, share in copies] == pytest.approx([0.4, 0.4, 0.2])
    scaled = trace.scaled_to(2.5, 7)
    shifts = np.array([offset_s % 1.0 for offset_s, _ in copies])
    apart = np.abs(scaled.arrival_s[:, None] % 1.0 - shifts)
    of_copy = np.argmin(np.minimum(apart, 1 - apart), axis=1)
    assert np.min(np.minimum(apart, 1 - apart), axis=1).max() < 1e-9
    assert np.bincount(of_copy)[:2].tolist() == [100, 100]
    assert trace.copies_at(0.4, 7) == ((0.0, 1.0),)


def test_without_a_known_length_windows_end_with_the_arrivals():
    """Whatever the policy needs until the last token: windows are the same for all."""
    arrival = np.array([0.0, 130.0, 250.0, 355.0])
    for end_s in (356.0, 900.0):
        requests = requests_of(arrival, arrival + 0.1, arrival + 0.1, np.ones(4))
        record = tiny(requests=requests, totals={"energy_j": 600.0, "duration_s": end_s})
        windows = window_totals(record)
        assert windows["begin_s"].tolist() == [0.0, 120.0]
        assert windows["n_counted"].tolist() == [1, 3]


def test_windows_split_energy_by_time_and_spread_what_the_timeline_lacks():
    requests = requests_of([1.0, 31.0], [1.1, 32.5], [1.1, 32.5], [5, 5])
    timeline = {name: np.zeros(1) for name in tiny().timeline} | {
        "time_s": np.array([15.0]),
        "duration_s": np.array([20.0]),
        "idle_s": np.array([10.0]),
        "energy_j": np.array([300.0]),
    }
    record = tiny(
        requests=requests,
        timeline=timeline,
        totals={"energy_j": 345.0, "duration_s": 45.0},
        workload_s=45.0,
    )
    windows = window_totals(record, 20.0)  # two windows of 22.5 s
    assert windows["energy_j"] == pytest.approx([75 + 22.5, 225 + 22.5])
    assert windows["n_counted"].tolist() == [1, 1]
    assert windows["n_met"].tolist() == [1, 0]


def test_a_second_writer_is_refused_and_leaves_the_first_ones_part_alone(tmp_path):
    with RunDirectory(tmp_path / "run", CONFIG) as first:
        half = tmp_path / "run" / run_files.PARTS / ".half"
        half.mkdir()
        for resume in (True, False):
            with pytest.raises(BiscaleError, match=r"the run directory .*run is in use by another"):
                RunDirectory(tmp_path / "run", CONFIG, resume=resume)
        assert half.is_dir()
        first.add(tiny())
    again = RunDirectory(tmp_path / "run", CONFIG, resume=True)
    assert again.has(tiny().key)
    assert not half.exists()


def test_a_writer_that_is_refused_or_fails_keeps_no_lock(tmp_path):
    RunDirectory(tmp_path, CONFIG)
    refused = []
    for config, resume in ((CONFIG, False), (CONFIG | {"seeds": 7}, True)):
        with pytest.raises(BiscaleError) as error:
            RunDirectory(tmp_path, config, resume=resume)
        refused.append(error)  # its traceback holds the object
    with pytest.raises(ZeroDivisionError), RunDirectory(tmp_path, CONFIG, resume=True):
        raise ZeroDivisionError
    with RunDirectory(tmp_path, CONFIG, resume=True) as run:
        run.add(tiny())


@pytest.mark.slow
def test_a_killed_writer_is_resumed_and_its_debris_removed(tmp_path):
    code = (
        "import os, signal; from biscale_env.evaluation.runs.rundir import RunDirectory\n"
        f"run = RunDirectory({str(tmp_path / 'run')!r}, {{'a': 1}}); os.kill(os.getpid(), 9)"
    )
    child = subprocess.run([sys.executable, "-c", code])
    assert child.returncode == -9
    debris = [tmp_path / "run" / f".0123abcd.{name}" for name in ("results.parquet", "tuning.csv")]
    for path in debris:
        path.write_text("half")
    with RunDirectory(tmp_path / "run", {"a": 1}, resume=True) as run:
        run.add(tiny())
    assert not any(path.exists() for path in debris)
    assert len(load_run(tmp_path / "run").results) == 1


def test_a_run_that_died_before_its_first_file_is_begun_anew(tmp_path):
    for name in (".lock", ".0123abcd.config.yaml"):
        (tmp_path / name).write_text("")
    RunDirectory(tmp_path, CONFIG)
    assert visible(tmp_path) == [run_files.CONFIG, run_files.PARTS, run_files.PROVENANCE]


A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize("name", ["trace t.csv (prefill)", "checkpoint x.npz", "model m (f.yaml)"])
def test_resume_on_changed_inputs_names_what_changed(tmp_path, name):
    RunDirectory(tmp_path, CONFIG, inputs={"other": B, name: A})
    with pytest.raises(BiscaleError) as error:
        RunDirectory(tmp_path, CONFIG, resume=True, inputs={"other": B, name: B})
    assert f"cannot resume {tmp_path}: {name} has changed since" in str(error.value)
    assert f"(sha256 was {A[:12]} and is now {B[:12]})" in str(error.value)
    # inputs of new policies are added, those of policies that are left out now are remembered
    RunDirectory(tmp_path, CONFIG, resume=True, inputs={name: A, "new": A})
    RunDirectory(tmp_path, CONFIG, resume=True)
    with pytest.raises(BiscaleError, match="new has changed since"):
        RunDirectory(tmp_path, CONFIG, resume=True, inputs={"new": B})
    kept = json.loads((tmp_path / run_files.PROVENANCE).read_text())
    assert kept["sha256"] == {"other": B, name: A, "new": A}
    assert len(kept["earlier"]) == 2


def test_a_directory_of_an_older_version_without_digests_is_resumed(tmp_path):
    RunDirectory(tmp_path, CONFIG)
    path = tmp_path / run_files.PROVENANCE
    old = json.loads(path.read_text())
    del old["sha256"]
    path.write_text(json.dumps(old) + "\n")
    RunDirectory(tmp_path, CONFIG, resume=True, inputs={"a": A})
    assert json.loads(path.read_text())["sha256"] == {"a": A}


def further():
    """Tables that a tuned policy leaves with the first of its runs."""
    curve = {
        "setting": ["margin=0.1"],
        "window": [0.0],
        "day": [0.0],
        "energy_j": [1.0],
        "n_met": [3.0],
    }
    curve |= {"n_counted": [3.0], "output_tokens": [31.0]}
    members = {"member": [0.0], "energy_j": [1.0], "attainment": [1.0]}
    return {
        run_files.CURVES: pd.DataFrame(curve),
        run_files.MEMBERS: pd.DataFrame(members),
    }


@pytest.fixture
def whole(tmp_path):
    """A run directory with one of every file, a finished part included."""
    point = {"scenario": "s", "phase": "prefill", "slo": "b", "load": 0.5, "tp": 4, "dtype": "bf16"}
    with RunDirectory(tmp_path / "run", CONFIG, inputs={"a": A}) as run:
        run.name_infeasible([point | {"reason": "too fast"}])
        pd.DataFrame({"policy": ["max"]}).to_csv(tmp_path / "run" / run_files.TUNING, index=False)
        run.add(tiny(workload_seed=0), further=further())
    part = RunDirectory(tmp_path / "run", CONFIG, resume=True)
    part.add(tiny(workload_seed=1), further=further())
    return tmp_path / "run"


PART = tiny(workload_seed=1).run_id
EVERY_FILE = [
    run_files.CONFIG,
    run_files.PROVENANCE,
    run_files.RESULTS,
    *run_files.TABLES,
    *run_files.JOB_TABLES,
    run_files.SUMMARY,
    run_files.INFEASIBLE,
    run_files.TUNING,
    *(
        f"{run_files.PARTS}/{PART}/{name}"
        for name in (run_files.RESULTS, *run_files.TABLES, *run_files.JOB_TABLES)
    ),
]


def test_every_file_of_a_run_directory_is_among_those_damaged(whole):
    found = {str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file()}
    assert found == {*EVERY_FILE, run_files.LOCK}


@pytest.mark.parametrize("kept", [slow("nothing"), slow("half"), slow("all but the end"), "noise"])
@pytest.mark.parametrize("name", EVERY_FILE)
def test_a_damaged_file_is_one_sentence_with_a_way_on(whole, name, kept):
    path = whole / name
    content = path.read_bytes()
    keep = {"nothing": 0, "half": len(content) // 2, "all but the end": len(content) - 1}
    path.write_bytes(content[: keep[kept]] if kept in keep else b"\x00\xff: [" * 20)

    def use():
        with RunDirectory(whole, CONFIG, resume=True) as run:
            run.add(tiny(workload_seed=2))
        opened = load_run(whole)
        assert opened.config
        assert opened.provenance
        assert len(opened.infeasible) == len(opened.tuning) == 1
        return opened.summary(), opened.requests, opened.timelines, opened.curves

    if name == run_files.SUMMARY:  # written, never read
        use()
        return
    with pytest.raises(BiscaleError) as error:
        use()
    assert str(path) in str(error.value)
    advice = "restore it" if name in (run_files.CONFIG, run_files.PROVENANCE) else "delete "
    assert advice in str(error.value)
    assert ("is empty" if kept == "nothing" else "is damaged or cut off") in str(error.value)
    if name == run_files.CONFIG:
        return
    # the advice helps: what is deleted is made again or done without
    for doomed in [path.parent] if run_files.PARTS in name else [path, whole / run_files.RESULTS]:
        if doomed.is_dir():
            [inside.unlink() for inside in doomed.iterdir()]
            doomed.rmdir()
        elif name != run_files.PROVENANCE or doomed == path:
            doomed.unlink(missing_ok=True)
    with RunDirectory(whole, CONFIG, resume=True) as run:
        missing = [seed for seed in (0, 1) if not run.has(tiny(workload_seed=seed).key)]
        for seed in missing:
            run.add(tiny(workload_seed=seed))
    assert load_run(whole).results["workload_seed"].tolist() == [0, 1]


def test_a_part_without_its_row_is_one_sentence(whole):
    (whole / run_files.PARTS / PART / run_files.RESULTS).unlink()
    with pytest.raises(BiscaleError, match=r"is missing: delete the folder .*parts.*runs it again"):
        RunDirectory(whole, CONFIG, resume=True)


def test_a_full_disk_names_the_part_or_file_and_keeps_what_is_finished(whole, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28]")

    def interrupted():
        with RunDirectory(whole, CONFIG, resume=True) as run:
            monkeypatch.setattr(pq, "write_table", full)
            monkeypatch.setattr(pd.DataFrame, "to_parquet", full)  # merging fails after it
            run.add(tiny(workload_seed=2))

    with pytest.raises(OSError, match="No space left on device") as error:
        interrupted()
    third = tiny(workload_seed=2).run_id
    assert error.value.filename == str(whole / run_files.PARTS / third)
    monkeypatch.undo()
    with RunDirectory(whole, CONFIG, resume=True) as run:
        assert not run.has(tiny(workload_seed=2).key)
    assert load_run(whole).results["workload_seed"].tolist() == [0, 1]


def fill(path):
    with RunDirectory(path, CONFIG) as run:
        for seed in range(50):
            run.add(tiny(workload_seed=seed))


def test_a_run_directory_on_a_full_disk(tmp_path):
    tiny_disk = tmp_path / "disk"
    tiny_disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tiny_disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(OSError, match="No space left on device") as error:
            fill(tiny_disk / "run")
        assert str(error.value.filename).startswith(str(tiny_disk / "run"))
        finished = {p.name for p in (tiny_disk / "run" / run_files.PARTS).iterdir()}
        assert 0 < len(finished) < 50
        assert not any(name.startswith(".") for name in finished)
        for name in finished:
            assert len(os.listdir(tiny_disk / "run" / run_files.PARTS / name)) == 4
    finally:
        # lazily: another run of the tests may be looking into its old folders
        subprocess.run(["umount", "--lazy", str(tiny_disk)], check=True)


def test_failed_requests_are_judged_alike_after_reading(tmp_path):
    """A request that failed in the last instant counts, though its deadline has not passed."""
    failed = np.array([False, False, True])
    requests = dict(tiny().requests)
    requests["first_token_s"] = np.array([0.5, 1.6, np.nan])
    requests["arrival_s"] = np.array([0.0, 1.0, 2.9])
    with RunDirectory(tmp_path, {}) as run:
        row = run.add(tiny(requests=requests | {"failed": failed}))
        run.add(tiny(requests=requests, workload_seed=1))
    opened = load_run(tmp_path)
    assert row["n_counted"] == 3
    assert opened.latencies(row["run_id"], "ttft")[0].size == 3
    other = opened.results["run_id"][opened.results["workload_seed"] == 1].iloc[0]
    assert opened.latencies(other, "ttft")[0].size == 2
    assert opened.requests_of(row["run_id"])["failed"].tolist() == [0.0, 0.0, 1.0]


def test_requests_of_an_older_version_are_merged_with_new_ones(tmp_path):
    with RunDirectory(tmp_path, {}) as run:
        run.add(tiny(workload_seed=0))
    path = tmp_path / run_files.REQUESTS
    old = pq.read_table(path).drop_columns("failed")
    pq.write_table(old, path)
    with RunDirectory(tmp_path, {}, resume=True) as run:
        run.add(tiny(workload_seed=1))
    assert load_run(tmp_path).requests["failed"].tolist() == [0.0] * 6
    assert len(load_run(tmp_path).latencies(tiny(workload_seed=0).run_id, "ttft")[0]) == 3


def test_rows_that_are_read_and_written_again_stay_the_same_to_the_byte(tmp_path):
    path = tmp_path / run_files.TUNING
    pd.DataFrame({"energy_j": np.random.default_rng(0).random(1000)}).to_csv(path, index=False)
    before = path.read_bytes()
    run_files.read_csv(path).to_csv(path, index=False)
    assert path.read_bytes() == before
