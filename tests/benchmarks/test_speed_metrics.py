"""The benchmarks measure what they say they measure; how fast that is, no test asserts."""

import time
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pytest_benchmark")

import test_cluster
import test_decisions
import test_environments
import test_hardware_loop
import test_simulators
from meter import Meter, Metric

from biscale_env.envs.loads.capacity import run_static
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.traces import generate
from controllers.placement.ilp import CapacityEntry, CapacityTable


class Plugin:
    """What the meter uses of pytest-benchmark, without its many rounds."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.calls = 0

    def pedantic(self, work: Any, rounds: int = 1, warmup_rounds: int = 0) -> Any:
        spent = []
        for _ in range(warmup_rounds + 2):
            start = time.perf_counter()
            result = work()
            spent.append(time.perf_counter() - start)
            self.calls += 1
        self.stats = type("S", (), {})()
        self.stats.stats = type("S", (), {"min": min(spent), "median": float(np.median(spent))})()
        return result


@pytest.fixture
def meter() -> Meter:
    return Meter(Plugin())


def test_ratio_is_above_one_when_better() -> None:
    lower = Metric("a", 5.0, "ms", 20.0)
    higher = Metric("b", 5.0, "1/s", 20.0, "higher")
    assert (lower.ratio, higher.ratio) == (4.0, 0.25)
    assert Metric("nothing failed", 0.0, "", 0.0).ratio == float("inf")


def test_the_line_says_met_or_missed() -> None:
    assert "2.50 M" in (line := Metric("quick", 2.5e6, "1/s", 1e6, "higher", 2e6).line())
    assert "2.50 x  met  (median 2.00 M)" in line
    assert "0.50 x  MISSED" in Metric("slow", 8.0, "ms", 4.0).line()
    assert "met" in Metric("nothing failed", 0.0, "", 0.0).line()


def test_metrics_reach_the_json_with_their_ratio(meter: Meter) -> None:
    meter.time(lambda: None, "thing", "us", 1e6)
    (kept,) = meter.benchmark.extra_info["metrics"]
    assert kept["name"] == "thing"
    assert kept["ratio"] == pytest.approx(1e6 / kept["value"])


def test_rates_count_what_the_work_does(meter: Meter) -> None:
    meter.rate(lambda: time.sleep(0.01), 5.0, "things", "1/s", 1.0)
    assert 100.0 < meter.metrics[0].value <= 500.0


def test_decode_gets_the_requests_when_prefill_is_done_with_them() -> None:
    trace = generate("azure-conv-like", rate_rps=5.0, duration_s=60.0, seed=0)
    run = run_static(Plant(PlantSettings.of("prefill")), trace, 1980.0)
    ready = test_simulators.handed_over(trace, run)
    assert (np.diff(ready.arrival_s) >= 0).all()
    np.testing.assert_allclose(np.sort(trace.arrival_s + run.latency_s), ready.arrival_s)
    for field in ("prompt_tokens", "output_tokens"):
        assert sorted(getattr(trace, field)) == sorted(getattr(ready, field))


def test_hour_runs_every_request(meter: Meter) -> None:
    trace = generate("azure-conv-like", rate_rps=5.0, duration_s=30.0, seed=0)
    plants = Plant(PlantSettings.of("prefill")), Plant(PlantSettings.of("decode"))
    test_simulators.test_hour_through_both_phases(meter, plants, trace)
    test_simulators.test_decode_iterations(meter, plants, trace)
    hour, iterations = meter.metrics
    assert (hour.unit, iterations.unit) == ("ms", "1/s")
    assert f"({len(trace)} requests)" in hour.name
    ready = test_simulators.handed_over(trace, run_static(plants[0], trace, 1980.0))
    assert f"({run_static(plants[1], ready, 1980.0).iterations})" in iterations.name


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_environment_metrics(meter: Meter, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    monkeypatch.setattr(test_environments, "NUM_ENVS", 4)
    monkeypatch.setattr(test_environments, "SINGLE_STEPS", 20)
    test_environments.test_vector_steps(meter, phase)
    test_environments.test_single_steps(meter, phase)
    for metric in meter.metrics:
        assert metric.unit == "steps/s"
        assert metric.beside is not None
        assert metric.value >= metric.beside > 0


def test_resets_and_steps_add_up() -> None:
    import gymnasium as gym

    env = gym.make("BiScale/Prefill-v1", rate_rps=3.0, episode_s=3.0)
    resets, stepping, total = test_environments.timed_episodes(env, 300)
    assert len(resets) > 3
    assert 0.0 < stepping + resets.sum() <= total * 1.05


def test_observations_for_decisions_are_busy_ones() -> None:
    plant = Plant(PlantSettings.of("prefill"))
    observations = test_decisions.busy_observations(plant, 50)
    assert observations.shape == (50, plant.spec.dim)
    assert (plant.spec.value(observations, "queue_requests") > 0).all()
    assert len(np.unique(observations, axis=0)) == 50


def test_programme_covers_loads_up_to_nearly_infeasible(meter: Meter) -> None:
    rows = [
        ("prefill", 4, 1980.0, 20.0, 100.0),
        ("decode", 4, 1980.0, 10.0, 200.0),
        ("decode", 8, 1200.0, 18.0, 160.0),
    ]
    table = CapacityTable(tuple(CapacityEntry(*r) for r in rows), "biscale", "by hand")
    test_cluster.test_programme(meter, [(table, 1.0)])
    (metric,) = meter.metrics
    assert metric.beside is not None
    assert 0 < metric.beside <= metric.value < 1.0


@pytest.mark.slow
def test_memory_of_a_day_is_compared_with_a_shorter_one(
    meter: Meter, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path))
    monkeypatch.setattr(test_cluster, "DAY_RPS", 4.0)
    monkeypatch.setattr(test_cluster, "HOURS", (0.25, 0.5))
    test_cluster.test_day(meter)
    day, memory = meter.metrics
    assert "0.5 h on 16 GPUs, 0.01 M requests" in day.name
    assert day.value > 0
    assert memory.value >= 1.0  # a peak never falls


def test_the_hook_is_timed_on_full_batches() -> None:
    _, output = test_hardware_loop.stand_in(256, 0, 0)
    assert len(output.num_scheduled_tokens) == 256
    cpu_s, wall_s = test_hardware_loop.hook_times_s((256, 0, 0), repeats=50)
    assert 0 < cpu_s < 5e-3
    assert 0 < wall_s < 5e-3


def test_answers_are_counted_where_the_loop_is_settled() -> None:
    from types import SimpleNamespace

    times = np.linspace(0.0, test_hardware_loop.DURATION_S, 1001)
    requests = [SimpleNamespace(error="", last_chunk_s=100.0 + t) for t in times]
    lost = [SimpleNamespace(error="503", last_chunk_s=115.0) for _ in range(500)]
    raw = SimpleNamespace(start_s=100.0, requests=[*requests, *lost])
    assert test_hardware_loop.answers_per_s(raw) == pytest.approx(50.0, rel=0.01)
