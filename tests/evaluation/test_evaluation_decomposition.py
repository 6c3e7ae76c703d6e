"""Where a saving comes from: closed forms, and parts that add up."""

import math

import numpy as np
import pandas as pd
import pytest
from evaluation_synthetic import tiny
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.report.decomposition_table import (
    HEADS,
    NOTE,
    decomposition_markdown,
    write_decomposition,
)
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.evaluation.rollouts.same_work import attention_work
from biscale_env.evaluation.runs import results
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.evaluation.stats.decomposition import AT_MAX, Spent, decompose, difference
from biscale_env.evaluation.stats.metrics import results_row
from biscale_env.policies import resolve_policy
from biscale_env.sim.prefill import form_batch
from biscale_env.traces import Trace, generate

energies = st.floats(1.0, 1e6)
spent = st.builds(Spent, energies, energies, st.floats(0.0, 1e6))


def plant_of(phase, **settings):
    return Plant(PlantSettings.of(phase, actuation_delay_s=0.0, **settings))


def run_of(plant, policy, trace):
    (run,) = rollout(resolve_policy(policy, plant), plant, [trace], time_probe=False)
    return run


def record_of(phase, policy, run, **changes):
    return tiny(
        phase=phase,
        policy=policy,
        requests=run.requests,
        timeline=run.timeline,
        totals=run.totals,
        **changes,
    )


def frame_of(phase, runs):
    return results.results_frame(
        results_row(record_of(phase, policy, run)) for policy, run in runs.items()
    )


@given(spent, spent)
def test_parts_add_up_and_change_sign_with_the_direction(run, reference):
    there, back = difference(run, reference), difference(reference, run)
    total = run.busy_j + run.idle_j - reference.busy_j - reference.idle_j
    scale = max(run.busy_j, reference.busy_j) * max(
        run.at_max_j / reference.at_max_j, reference.at_max_j / run.at_max_j
    )
    assert sum(there) == pytest.approx(total, abs=1e-9 * (scale + run.idle_j + reference.idle_j))
    for one, other in zip(there, back, strict=True):
        assert one == pytest.approx(-other, abs=1e-9 * scale)
    # both factors of g R, each exchanged first and second
    g, g0 = run.busy_j / run.at_max_j, reference.busy_j / reference.at_max_j
    batches = (run.at_max_j - reference.at_max_j) * (g + g0) / 2
    assert there.batches == pytest.approx(batches, abs=1e-9 * scale)


@given(energies, st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_one_factor_alone_is_one_part(busy_j, clock, batches):
    base = Spent(busy_j, busy_j, 5.0)
    slower = difference(Spent(clock * busy_j, busy_j, 5.0), base)
    fuller = difference(Spent(batches * busy_j, batches * busy_j, 5.0), base)
    calmer = difference(Spent(busy_j, busy_j, 2.0), base)
    tolerance = 1e-9 * busy_j
    for found, expected in (
        (slower, ((clock - 1) * busy_j, 0, 0)),
        (fuller, (0, (batches - 1) * busy_j, 0)),
        (calmer, (0, 0, -3)),
    ):
        assert found == pytest.approx(expected, abs=tolerance)


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 5000)), min_size=1, max_size=20),
    st.sampled_from([1, 64, 700, 2048]),
)
def test_attention_work_is_that_of_the_batches(prompts, budget):
    prompt, prefix = np.array(prompts, dtype=np.int32).T
    if budget == 1:
        prompt = np.minimum(prompt, 5).astype(np.int32)
    head, done, tokens, work = 0, 0, [], []
    while head < len(prompt):
        batch = form_batch(prompt, prefix, head, done, len(prompt), budget, 3)
        head, done = batch.head, batch.head_done
        tokens.append(batch.tokens)
        work.append(batch.attn_work)
    np.testing.assert_allclose(attention_work(prompt, prefix, np.array(tokens, dtype=float)), work)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_same_work_at_the_highest_clock_is_what_max_clock_spends(phase):
    """Chunks, batches under the cap and preemption-free decode, from the timeline alone."""
    trace = generate("azure-conv-like", rate_rps=3.0, duration_s=60.0, seed=4)
    run = run_of(plant_of(phase), "max", trace)
    busy_j = run.totals["energy_j"] - run.totals["energy_idle_j"]
    assert run.totals[AT_MAX] == pytest.approx(busy_j, rel=1e-9)
    slow = run_of(plant_of(phase), "static:1005", trace)
    busy_j = slow.totals["energy_j"] - slow.totals["energy_idle_j"]
    assert slow.totals[AT_MAX] > 1.05 * busy_j


def test_two_constant_clocks_without_batching_differ_by_clock_and_idle_alone():
    """Requests far apart: by hand from the physics; the part of the batches is 0."""
    n, gap_s, tokens, freq = 12, 2.0, 1000, 1005.0
    columns = gap_s * np.arange(n), np.full(n, tokens), np.full(n, 2)
    trace = Trace("apart", *columns, "test", duration_s=n * gap_s)
    plant = plant_of("prefill")
    runs = {policy: run_of(plant, policy, trace) for policy in ("max", f"static:{freq:g}")}
    (_, row) = decompose(frame_of("prefill", runs)).to_dict("records")
    work = (tokens, tokens**2 / 2, 0, 1)
    top, low = (float(plant.model.energy_j(*work, f)) for f in (1980.0, freq))
    waits = [
        plant.waiting_power_w(-1, f)
        * (trace.duration_s - n * float(plant.model.latency_s(*work, f)))
        for f in (1980.0, freq)
    ]
    reference_j = n * top + waits[0]
    assert row["reference_j"] == pytest.approx(reference_j, rel=1e-9)
    assert row["clock"] == pytest.approx(n * (low - top) / reference_j, rel=1e-9)
    assert row["idle"] == pytest.approx((waits[1] - waits[0]) / reference_j, rel=1e-9)
    assert row["batches"] == pytest.approx(0.0, abs=1e-12)
    assert (row["iterations"], row["clock_factor"]) == (1.0, pytest.approx(low / top, rel=1e-9))


def test_a_parked_pair_differs_by_no_idle_power():
    """Parked, a lower clock is even charged less idle energy: it waits less."""
    trace = generate("azure-conv-like", rate_rps=1.0, duration_s=120.0, seed=4)
    parts = {}
    for idle in ("last-clock", "parked"):
        plant = plant_of("prefill", idle=idle, parked_power_w=85.0, parked_ramp_s=0.0)
        runs = {policy: run_of(plant, policy, trace) for policy in ("max", "static:1005")}
        (_, parts[idle]) = decompose(frame_of("prefill", runs)).to_dict("records")
        waited_s = [r.totals["duration_s"] - r.totals["busy_s"] for r in runs.values()]
    expected_j = 4 * 85.0 * (waited_s[1] - waited_s[0])
    assert parts["parked"]["idle"] * parts["parked"]["reference_j"] == pytest.approx(expected_j)
    assert parts["last-clock"]["idle"] < 2 * parts["parked"]["idle"] < 0


@pytest.mark.slow
def test_decode_saves_by_fuller_batches_too():
    trace = generate("azure-conv-like", rate_rps=12.0, duration_s=60.0, seed=4)
    plant = plant_of("decode")
    runs = {p: run_of(plant, p, trace) for p in ("max", "static:1500", "static:705")}
    frame = frame_of("decode", runs)
    table = decompose(frame).set_index("policy")
    ratio = frame.set_index("policy")["energy_ratio"]
    assert table.loc["max", ["total", "clock", "batches", "idle"]].tolist() == [0, 0, 0, 0]
    for policy in ("static:1500", "static:705"):
        row = table.loc[policy]
        assert row["total"] == pytest.approx(ratio[policy] - 1.0, rel=1e-9)
        assert row[["clock", "batches", "idle"]].sum() == pytest.approx(row["total"], rel=1e-9)
        assert row["clock"] < -0.01
    assert table.loc["static:705", "batches"] < table.loc["static:1500", "batches"] < 0
    assert table.loc["static:705", "iterations"] < table.loc["static:1500", "iterations"] < 1
    text = decomposition_markdown(frame)
    assert text.count("| static:") == 2
    assert "| max |" not in text
    assert all(head in text for head in HEADS)


def test_runs_that_cannot_be_compared_are_left_out(tmp_path):
    """Measured runs tell nothing of the same work; without max clock there is no difference."""
    alone = results.results_frame([results_row(tiny(policy="mpc"))])
    assert decompose(alone).empty
    assert decomposition_markdown(alone) == ""
    assert decompose(pd.DataFrame()).empty
    plant = plant_of("decode", min_decision_interval_s=0.5)
    run = run_of(plant, "max", generate("azure-conv-like", rate_rps=3.0, duration_s=20.0, seed=4))
    assert math.isnan(run.totals[AT_MAX])
    with RunDirectory(tmp_path / "run", {}) as directory:
        directory.add(tiny(policy="max"))
        directory.add(tiny(policy="mpc"))
    assert write_decomposition(load_run(tmp_path / "run")) is None


def test_the_page_and_the_file_hold_the_parts(tmp_path):
    from biscale_env.evaluation.report.page import write_report

    trace = generate("azure-conv-like", rate_rps=2.0, duration_s=60.0, seed=4)
    plant = plant_of("prefill")
    with RunDirectory(tmp_path / "run", {}) as directory:
        for policy in ("max", "static:1005"):
            directory.add(record_of("prefill", policy, run_of(plant, policy, trace)))
    run = load_run(tmp_path / "run")
    stored = pd.read_csv(write_decomposition(run))
    assert stored["policy"].tolist() == ["max", "static:1005"]
    row = stored.iloc[1]
    assert row["total"] == pytest.approx(row["clock"] + row["batches"] + row["idle"])
    page = write_report(run).read_text(encoding="utf-8")
    assert f"<td>{100 * row['clock']:+.1f}</td>" in page
    assert NOTE in page
