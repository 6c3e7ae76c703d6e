"""The bench of the cluster measures what it says it measures.

How fast that is, no test here asserts.
"""

import json

import pytest
from typer.testing import CliRunner

from biscale_env.benchmarks import cluster_loops, loops
from biscale_env.cli import build
from controllers.placement.ilp import CapacityEntry, CapacityTable


def test_window_runs_the_whole_load(monkeypatch):
    monkeypatch.setattr(cluster_loops, "cpu_seconds", lambda work: (work(), (0.03, 0.04))[1])
    figure = cluster_loops.measure_window(2.0)
    assert (figure.value, figure.beside, figure.unit) == (30.0, 40.0, "ms")
    assert figure.ratio == pytest.approx(50 / 30)
    assert "16 GPUs, 2 requests/s" in figure.name


def test_ilp_covers_loads_up_to_nearly_infeasible():
    rows = [
        ("prefill", 4, 1980.0, 20.0, 100.0),
        ("decode", 4, 1980.0, 10.0, 200.0),
        ("decode", 8, 1200.0, 18.0, 160.0),
    ]
    figure = cluster_loops.measure_ilp(
        CapacityTable(tuple(CapacityEntry(*r) for r in rows), "biscale", "by hand")
    )
    assert 0 < figure.beside <= figure.value < 1.0


def test_memory_of_a_day_is_compared_with_a_shorter_one(monkeypatch, tmp_path):
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path))
    monkeypatch.setattr("biscale_env.reproduce.day_defaults.DAY_RPS", 4.0)
    day, memory = cluster_loops.measure_day((0.25, 0.5))
    assert "0.5 h on 16 GPUs, 0.01 M requests" in day.name
    assert day.value > 0
    assert memory.value >= 1.0  # a peak never falls


def test_command(monkeypatch):
    figures = [loops.Measurement("thing", 2.0, 3.0, "s", 4.0, "lower")]
    monkeypatch.setattr(cluster_loops, "measure_cluster", lambda: iter(figures))
    found = json.loads(CliRunner().invoke(build(), ["bench", "--cluster", "--json"]).output)
    assert [f["name"] for f in found] == ["thing"]
    assert found[0]["ratio"] == 2.0
