"""A day of cells: every request to one cell, the same however cells are grouped."""

import numpy as np
import pytest
from cluster_support import random_trace
from typer.testing import CliRunner

from biscale_env.cli import build
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_settings import ClusterSettings
from biscale_env.jobs.workers import Workers
from biscale_env.reproduce import cells, systems
from biscale_env.reproduce.cells import (
    FRONTS,
    GROUPS_ON_RAY,
    CellsPlan,
    added,
    cell_of,
    groups_of,
    parts_of,
    run_cells,
    run_group,
)
from biscale_env.reproduce.day import WINDOW_S, DayPlan, day_systems, run_day
from biscale_env.reproduce.day_defaults import DAY_MARGIN
from biscale_env.reproduce.day_report import about_cells
from biscale_env.reproduce.systems import Bench, TunedSystem
from controllers.placement.capacity_table import TableRequest, capacity_table

SETTINGS = {"gpus": 16, "dtype": "fp8", "slo": "biscale"}
DAY = DayPlan(SETTINGS, 6.0, 2 * WINDOW_S, "sharegpt-like", 0.3)
PLAN = CellsPlan(DAY, 3)


@pytest.fixture(scope="module")
def bench():
    settings = ClusterSettings.of(**SETTINGS)
    sample = random_trace(2000, rate_rps=16.0, seed=4, prompt_max=400, output_max=500)
    table = capacity_table(TableRequest(settings, (1200.0, 1980.0)), sample, use_cache=False)
    return Bench(settings, table, DAY.rate_rps, WINDOW_S)


@pytest.fixture(scope="module")
def together(bench):
    return run_group(PLAN, bench, [0, 1, 2])


@pytest.mark.parametrize("front", FRONTS)
def test_the_front_router_sends_every_request_to_one_cell(front):
    plan = CellsPlan(DAY, 5, front)
    first = 0
    for k, window in enumerate(plan.windows()):
        chosen = cell_of(plan, k, first, len(window))
        parts = parts_of(window, chosen, range(5))
        times = np.concatenate([part.arrival_s for part in parts])
        np.testing.assert_array_equal(np.sort(times), window.arrival_s)
        for number, part in enumerate(parts):
            np.testing.assert_array_equal(
                part.prompt_tokens, window.prompt_tokens[chosen == number]
            )
            np.testing.assert_array_equal(
                part.output_tokens, window.output_tokens[chosen == number]
            )
            assert part.duration_s == window.duration_s
        np.testing.assert_array_equal(
            parts_of(window, chosen, [3])[0].arrival_s, parts[3].arrival_s
        )
        sizes = np.array([len(part) for part in parts])
        # in turn: within one of another; at random: within five standard deviations
        spread = 1.0 if front == "round_robin" else 5 * np.sqrt(len(window) / 5)
        assert np.ptp(sizes) <= 2 * spread
        if front == "round_robin":
            assert np.ptp(sizes) <= 1
            assert chosen[0] == first % 5
        first += len(window)
    assert k == 1


def test_cells_come_out_the_same_however_they_are_grouped(bench, together):
    apart = [run_group(PLAN, bench, [k]) for k in (2, 0, 1)]
    for title, rows in together["rows"].items():
        for window, row in enumerate(rows):
            again = added([part["rows"][title][window] for part in apart])
            assert again == pytest.approx(row, rel=1e-12)
            for name in ("requests", "tokens", "late_ttft", "late_tpot", "gpus", "changed"):
                assert again[name] == row[name]


def test_every_request_of_the_stream_is_served_once(together):
    offered = sum(len(window) for window in PLAN.windows())
    for rows in together["rows"].values():
        assert sum(row["requests"] for row in rows) == offered
        assert rows[-1]["index"] == -1
        assert [row["index"] for row in rows[:-1]] == [0, 1]


def test_one_cell_is_the_cluster_of_before(bench):
    plan = CellsPlan(DAY, 1, "round_robin")
    found = run_group(plan, bench, [0])
    tuned = TunedSystem(alpha=DAY.alpha, prefill_margin=DAY_MARGIN, decode_margin=DAY_MARGIN)
    for title, system in day_systems().items():
        day = run_day(system, tuned, bench, plan.windows())
        for before, row in zip(day.windows, found["rows"][title], strict=True):
            assert {k: v for k, v in row.items() if k != "changed"} == {
                k: v for k, v in before.items() if k != "placement"
            }


def test_a_load_is_planned_once_for_both_systems(bench, monkeypatch):
    solved, solve = [], systems.biscale_plan

    def counted(table, rate_rps, *others):
        solved.append(rate_rps)
        return solve(table, rate_rps, *others)

    monkeypatch.setattr(systems, "biscale_plan", counted)
    run_group(CellsPlan(DAY, 1), bench, [0])
    assert len(solved) == len(set(solved)) == 2  # the first forecast, and the load of a window


@pytest.mark.slow
def test_groups_over_processes_add_up_to_all_cells(bench, together, monkeypatch, tmp_path):
    monkeypatch.setattr(cells, "day_bench", lambda *asked: bench)
    finished = []
    days, changes = run_cells(PLAN, Workers(2), tmp_path, lambda: finished.append(1))
    assert len(finished) == 2
    assert [p.stat().st_size for p in tmp_path.iterdir()] == [2, 2]  # a byte per window
    for title, rows in together["rows"].items():
        energy_j = sum(row["energy_j"] for row in rows)
        assert days[title].totals()["energy_j"] == pytest.approx(energy_j, rel=1e-12)
        assert changes[title] == sum(row["changed"] for row in rows if row["index"] >= 0)
    assert days["DistServe"].figures()["seconds"] > 0
    told = about_cells(PLAN, 10_800.0, Workers(2), 90.0)
    assert "on 1 process;" in about_cells(PLAN, 10_800.0, Workers(1), 90.0)
    assert told.startswith("48 GPUs as 3 cells")
    assert "1.5 min on 2 processes" in told


def test_groups_and_mistakes():
    assert groups_of(5, Workers(2)) == [[0, 2, 4], [1, 3]]
    assert groups_of(3, Workers(8)) == [[0], [1], [2]]
    assert len(groups_of(64, Workers(1, "auto"))) == GROUPS_ON_RAY
    for number, front, told in ((0, "random", "--cells must be"), (2, "least", "--front must be")):
        with pytest.raises(BiscaleError, match=told):
            CellsPlan(DAY, number, front)
    with pytest.raises(BiscaleError, match="positive number of requests/s"):
        CellsPlan(DayPlan(SETTINGS, 0.0, 300.0, "sharegpt-like", 0.1), 2)


def command(*words):
    return CliRunner().invoke(build(), ["reproduce", "day", *words])


def test_the_command_writes_a_page_of_all_cells(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(cells, "day_bench", lambda *asked: bench)
    words = ["--rate", "6", "--hours", "0.17", "--out", str(tmp_path)]
    done = command("--cells", "3", "--jobs", "1", *words)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "day.md").read_text()
    assert "48 GPUs as 3 cells" in page
    offered = sum(len(window) for window in PLAN.windows())
    assert f"{offered:,} requests in 0.167 h on cells of 16 x" in page


@pytest.mark.parametrize("where", [("--ray", "auto"), ("--jobs", "2")])
def test_one_cell_needs_no_workers(where, tmp_path):
    found = command(*where, "--out", str(tmp_path))
    assert isinstance(found.exception, BiscaleError)
    assert "give --cells" in str(found.exception)
    assert not list(tmp_path.iterdir())
