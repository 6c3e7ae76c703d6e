"""The run directory: whole or absent, resumable, faithful."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from evaluation_synthetic import POLICIES, SLO, plausible, requests_of, tiny

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.runs import run_files
from biscale_env.evaluation.runs.blocks import block_totals
from biscale_env.evaluation.runs.run_view import load_run, slo_of
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.evaluation.stats.metrics import results_row

CONFIG = {"scenario": {"load": 0.75, "policies": ("max", "mpc")}, "slo": SLO, "seeds": np.arange(2)}


def visible(path):
    """Names in a run directory, hidden leftovers included."""
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


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
    with RunDirectory(tmp_path, {}, seeds={"workload": [0]}, model_files=[__file__]) as run:
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
    provenance = json.loads((tmp_path / run_files.PROVENANCE).read_text())
    assert provenance["seeds"] == {"workload": [0]}
    assert provenance["packages"]["numpy"] == np.__version__
    assert len(provenance["model_sha256"]["test_evaluation_rundir.py"]) == 64
    assert provenance["command"]
    assert provenance["time_utc"].endswith("+00:00")


def test_requests_and_timelines_may_be_left_out(tmp_path):
    with RunDirectory(tmp_path, {}) as run:
        run.add(tiny(), keep_timeline=False, keep_requests=False)
    opened = load_run(tmp_path)
    run_id = opened.results["run_id"].iloc[0]
    assert opened.timeline_of(run_id) is None
    assert opened.latencies(run_id, "ttft") is None
    assert np.isnan(opened.summary()["ttft_p99_s_ci_low"].iloc[0])
    assert opened.summary()["attainment_ci_low"].iloc[0] < 1
    assert opened.timelines.empty


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
    assert len(load_run(tmp_path).blocks["run_id"].unique()) == 2


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


def test_blocks_add_up_to_the_run():
    record = plausible("prefill", "mpc", 3, duration_s=100.0)
    blocks, row = block_totals(record), results_row(record)
    assert blocks["energy_j"].sum() == pytest.approx(row["energy_j"])
    assert blocks["n_counted"].sum() == row["n_counted"]
    assert (blocks["n_counted"] - blocks["n_met"]).sum() == row["n_violations"]
    assert blocks["block"].size == 6  # 160 s of run in blocks of 30 s


def test_blocks_split_energy_by_time_and_spread_what_the_timeline_lacks():
    requests = requests_of([1.0, 31.0], [1.1, 32.5], [1.1, 32.5], [5, 5])
    timeline = {name: np.zeros(1) for name in tiny().timeline} | {
        "time_s": np.array([15.0]),
        "duration_s": np.array([20.0]),
        "idle_s": np.array([10.0]),
        "energy_j": np.array([300.0]),
    }
    record = tiny(
        requests=requests, timeline=timeline, totals={"energy_j": 345.0, "duration_s": 45.0}
    )
    blocks = block_totals(record)
    assert blocks["energy_j"] == pytest.approx([150 + 30, 150 + 15])
    assert blocks["n_counted"].tolist() == [1, 1]
    assert blocks["n_met"].tolist() == [1, 0]
