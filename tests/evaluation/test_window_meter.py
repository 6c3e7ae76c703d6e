"""Totals per window, against the timelines that they stand for."""

import numpy as np
import pytest
from evaluation_synthetic import tiny
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.evaluation.rollouts.window_meter import (
    WindowMeter,
    judged_windows,
    window_edges,
)
from biscale_env.evaluation.runs.blocks import window_totals
from biscale_env.policies import resolve_policy
from biscale_env.traces import generate


@pytest.mark.parametrize(
    ("duration_s", "ends"),
    [(30.0, [30.0]), (239.9, [239.9]), (240.0, [120.0, 240.0]), (375.0, [125.0, 250.0, 375.0])],
)
def test_windows_are_equal_and_none_is_shorter_than_two_minutes(duration_s, ends):
    assert window_edges(duration_s).tolist() == ends


def _parts_of(run):
    return {"requests": run.requests, "timeline": run.timeline, "totals": run.totals}


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_windows_are_the_kept_steps_cut_at_the_edges(phase):
    """The meter sees states only; the timeline has every step. Both must say the same."""
    plant = Plant(PlantSettings.of(phase, drain=True))
    rate = {"prefill": 1.5, "decode": 6.0}[phase]
    workloads = [generate("azure-conv-like", rate, 400.0, seed) for seed in (0, 1)]
    policy = resolve_policy("slack" if phase == "decode" else "mpc", plant)
    for run, trace in zip(
        rollout(policy, plant, workloads, keep_windows=True), workloads, strict=True
    ):
        windows, steps = run.windows, run.timeline
        assert windows.energy_j.size == 3
        assert windows.energy_j.sum() == pytest.approx(run.totals["energy_j"])
        ends = steps["time_s"] + steps["duration_s"] + steps["idle_s"]
        before = run.totals["energy_j"] - steps["energy_j"].sum()  # until the first decision
        sums = before + np.cumsum(steps["energy_j"])
        by_steps = np.interp(window_edges(trace.duration_s), ends, sums)
        after = (run.totals["energy_j"] - by_steps[-1]) / 3  # the last tokens', spread
        assert np.cumsum(windows.energy_j - after) == pytest.approx(by_steps, rel=1e-6)
        kept = window_totals(tiny(phase, **_parts_of(run), workload_s=400.0))
        # the steps lack the idle time before the first decision, less than a per cent
        assert kept["energy_j"] == pytest.approx(windows.energy_j, rel=1e-2)
        assert windows.n_counted.sum() == len(trace)
        assert windows.n_counted.sum() - windows.n_met.sum() == run.totals["n_violations"]
        assert windows.output_tokens.sum() == trace.output_tokens.sum()
        first = trace.arrival_s < 400.0 / 3
        assert windows.n_counted[0] == first.sum()
        assert windows.output_tokens[0] == trace.output_tokens[first].sum()


@given(st.lists(st.floats(0.01, 400.0), min_size=1, max_size=40), st.integers(1, 6))
def test_energy_at_a_constant_power_is_the_length_of_the_windows(steps_s, count):
    """Whatever the steps are, also where one crosses several edges at once."""
    edges = 50.0 * np.arange(1, count + 1)
    meter = WindowMeter([edges])
    time_s = np.cumsum(steps_s)
    for t in time_s:
        meter.add(
            np.array([(t, 7.0 * t)], dtype=[("time_s", "f8"), ("energy_j", "f8")]), None, None
        )
    found = meter.energy_j(0, 7.0 * time_s[-1])
    ends = np.minimum(edges, time_s[-1])
    after = np.maximum(time_s[-1] - edges[-1], 0.0) * np.arange(1, count + 1) / count
    assert np.cumsum(found) == pytest.approx(7.0 * (ends + after))


def test_a_request_that_misses_counts_in_the_window_it_arrives_in():
    record = tiny()  # arrivals at 0, 1 and 2 s; the last one is late
    plant = Plant(PlantSettings.of("prefill"))
    found = judged_windows(record.requests, plant, 3.0, np.array([1.0, 3.0]), np.array([5.0, 6.0]))
    assert found.n_counted.tolist() == [1.0, 2.0]
    assert found.n_met.tolist() == [1.0, 1.0]
    assert found.output_tokens.tolist() == [10.0, 21.0]
    assert found.energy_j.tolist() == [5.0, 6.0]
