"""The bench measures what it says it measures; how fast that is, no test asserts."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from biscale_env.benchmarks import loops
from biscale_env.cli import build
from biscale_env.envs.capacity import run_static
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.traces import generate


def test_ratio_is_above_one_when_better() -> None:
    lower = loops.Measurement("a", 5.0, 6.0, "ms", 20.0, "lower")
    higher = loops.Measurement("b", 5.0, 6.0, "1/s", 20.0, "higher")
    assert (lower.ratio, higher.ratio) == (4.0, 0.25)
    assert lower.as_dict() == {
        "name": "a", "value": 5.0, "median": 6.0, "unit": "ms", "target": 20.0, "better": "lower", "ratio": 4.0,
    }  # fmt: skip


def test_cpu_seconds_counts_work_and_not_sleep() -> None:
    import time

    calls = []
    best, median = loops.cpu_seconds(lambda: (calls.append(1), time.sleep(0.02)), windows=3)
    assert len(calls) == 4, "one to warm up"
    assert 0 <= best <= median < 0.02


def test_decode_gets_the_requests_when_prefill_is_done_with_them() -> None:
    trace = generate("azure-conv-like", rate_rps=5.0, duration_s=60.0, seed=0)
    run = run_static(Plant(PlantSettings.of("prefill")), trace, 1980.0)
    ready = loops.handed_over(trace, run)
    assert (np.diff(ready.arrival_s) >= 0).all()
    np.testing.assert_allclose(np.sort(trace.arrival_s + run.latency_s), ready.arrival_s)
    for field in ("prompt_tokens", "output_tokens"):
        assert sorted(getattr(trace, field)) == sorted(getattr(ready, field))


def test_hour_runs_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "WINDOWS", 1)
    trace = generate("azure-conv-like", rate_rps=5.0, duration_s=30.0, seed=0)
    hour, iterations = loops.measure_hour(trace)
    assert (hour.unit, iterations.unit) == ("ms", "1/s")
    assert f"({len(trace)} requests)" in hour.name
    ready = loops.handed_over(trace, run_static(Plant(PlantSettings.of("prefill")), trace, 1980.0))
    assert (
        f"({run_static(Plant(PlantSettings.of('decode')), ready, 1980.0).iterations})"
        in iterations.name
    )


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_env_figures(phase: str) -> None:
    for figure in (loops.measure_vector(phase, 4, 5), loops.measure_single(phase, 20)):
        assert figure.unit == "steps/s"
        assert figure.value >= figure.beside > 0


def test_observations_for_decisions_are_busy_ones() -> None:
    plant = Plant(PlantSettings.of("prefill"))
    observations = loops.busy_observations(plant, 50)
    assert observations.shape == (50, plant.spec.dim)
    assert (plant.spec.value(observations, "queue_requests") > 0).all()
    assert len(np.unique(observations, axis=0)) == 50


def test_command_prints_each_figure_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    from biscale_env.cli import bench_command as command

    figures = [
        loops.Measurement("quick thing", 2.5e6, 2e6, "1/s", 1e6, "higher"),
        loops.Measurement("slow", 8.0, 9.0, "ms", 4.0, "lower", "p99"),
    ]
    monkeypatch.setattr(command, "_measure", lambda trace: iter(figures))
    text = CliRunner().invoke(build(), ["bench"]).output.splitlines()
    assert "2.50 M" in text[0]
    assert "2.50 x  met" in text[0]
    assert "0.50 x  MISSED" in text[1]
    assert "p99 9" in text[1]
    data = json.loads(CliRunner().invoke(build(), ["bench", "--json"]).output)
    assert [row["ratio"] for row in data] == [2.5, 0.5]
