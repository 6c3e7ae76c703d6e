"""SLO classes in an instance: a bound for every request, and what a miss of it weighs."""

from dataclasses import replace

import numpy as np
import pytest

from biscale_env.config import load_slo
from biscale_env.config.loader import validate
from biscale_env.config.slo import Slo
from biscale_env.contract import spec_for
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.kpis import _alone
from biscale_env.envs.loads.capacity import _settings as search_settings
from biscale_env.envs.loads.capacity import capacity_key, find_capacity, run_static
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.envs.row_tables import RowTables
from biscale_env.traces import Trace, generate
from biscale_env.traces.request_classes import RequestClasses

TWO = load_slo("interactive-batch")
PHASES = ("prefill", "decode")


def plant_of(phase, slo=TWO):
    return Plant(PlantSettings.of(phase, drain=True, actuation_delay_s=0.0), slo)


def mixed(trace, seed=0):
    """A trace half of whose requests are of class batch."""
    names = np.where(np.random.default_rng(seed).random(len(trace)) < 0.5, "batch", "interactive")
    return replace(trace, classes=RequestClasses.of(names.tolist()))


def played(plant, trace, actions=(0.3, -1.0, -0.6)):
    """Observations and rewards of a run."""
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]), record=True)
    zero = np.zeros(1, dtype=np.int64)
    batch.reset(zero, zero, np.full(1, -1))
    seen, earned, k = [batch.obs[0].copy()], [], 0
    while not batch.done.all():
        batch.step(np.full(1, actions[k % len(actions)], dtype=np.float32))
        seen.append(batch.obs[0].copy())
        earned.append(float(batch.reward[0]))
        k += 1
    return batch, np.array(seen), np.array(earned)


@pytest.mark.parametrize(("phase", "rate_rps"), [("prefill", 9.0), ("decode", 60.0)])
def test_classes_that_promise_nothing_else_change_nothing(phase, rate_rps):
    same = validate(
        {**TWO.model_dump(), "classes": {"interactive": {}, "batch": {}}}, Slo, "same for all"
    )
    plain = TWO.model_copy(update={"classes": {}})
    trace = mixed(generate("azure-conv-like", rate_rps=rate_rps, duration_s=20.0, seed=1))
    one, two = (played(plant_of(phase, slo), trace) for slo in (plain, same))
    assert one[0].states["violations"] == two[0].states["violations"] > 0
    assert np.array_equal(one[2], two[2])
    if phase == "prefill":
        assert np.array_equal(one[1], two[1])
    else:  # slacks are looked up one by one instead of in a tree: they round differently
        np.testing.assert_allclose(one[1], two[1], atol=2e-6)


def alone(phase, latency_factor):
    """Requests far from each other, and a bound that none, or all of them, keep."""
    n = 6
    trace = Trace("t", 30.0 * np.arange(n), [900] * n, [20] * n, "", duration_s=30.0 * n)
    top = run_static(plant_of(phase), trace, 1980.0).latency_s.max()
    base = {"ttft_s": 10 * top, "tpot_s": 10 * top} | {
        f"{'ttft' if phase == 'prefill' else 'tpot'}_s": latency_factor * top
    }
    return trace, base


@pytest.mark.parametrize("phase", PHASES)
def test_a_miss_weighs_as_much_as_it_uses_up_of_what_its_class_may_miss(phase):
    trace, bounds = alone(phase, 0.5)
    wide = {key: 4.0 * value for key, value in bounds.items()}
    classes = {
        "strict": {"attainment": 0.999},
        "loose": {"attainment": 0.95},
        "wide": {**wide, "attainment": 0.95},
    }
    slo = validate({"name": "x", **bounds, "attainment": 0.99, "classes": classes}, Slo, "x")
    names = ["strict", "loose", "wide", None, "wide", "loose"]
    plant = plant_of(phase, slo)
    batch, _, earned = played(plant, replace(trace, classes=RequestClasses.of(names)), (1.0,))
    assert batch.states["violations"][0] == 4  # nobody of class wide
    lost = plant.settings.violation_weight * (10.0 + 0.2 + 1.0 + 0.2)
    energy = float(batch.states["energy_j"][0]) / plant.energy_ref_j
    assert earned.sum() == pytest.approx(-energy - lost)


def test_prefill_observes_the_tightest_deadline_first():
    """A batch request at the head does not hide that the one behind it is urgent."""
    trace = Trace(
        "t", [0.0, 0.001, 0.2], [9000, 9000, 100], [2] * 3, "",
        classes=RequestClasses.of(["batch", "batch", "interactive"]),
    )  # fmt: skip
    batch, seen, _ = played(plant_of("prefill"), trace, (1.0,))
    index = spec_for("prefill").index
    scale = spec_for("prefill").scale
    at = {name: index(name) for name in ("oldest_wait", "slo", "queue_requests")}
    waiting = seen[:, at["queue_requests"]] > 0
    assert np.allclose(seen[:, at["slo"]] * scale[at["slo"]], TWO.ttft_s)
    assert (seen[:, at["oldest_wait"]] >= 0).all()
    late = seen[waiting][:, at["oldest_wait"]].max() * scale[at["oldest_wait"]]
    longest_s = batch.finish_s[2] - 0.2
    assert 0 < late <= longest_s / TWO.ttft_s + 1e-6  # that of the interactive one alone


def test_decode_observes_the_tightest_bound_that_runs():
    trace = Trace(
        "t", [0.0, 0.1], [300, 300], [60, 10], "",
        classes=RequestClasses.of(["batch", "interactive"]),
    )  # fmt: skip
    _, seen, _ = played(plant_of("decode"), trace, (1.0,))
    spec = spec_for("decode")
    bound = seen[:, spec.index("slo")] * spec.scale[spec.index("slo")]
    batch = seen[:, spec.index("batch")] * spec.scale[spec.index("batch")]
    assert np.allclose(bound[batch == 2], 0.1)
    assert np.allclose(bound[(batch == 1)][:2], 0.5)
    assert {0.1, 0.5} <= set(np.round(bound, 6).tolist())


@pytest.mark.parametrize("phase", PHASES)
def test_wider_bounds_serve_more_and_have_a_capacity_of_their_own(phase):
    trace = mixed(generate("azure-conv-like", rate_rps=6.0, duration_s=240.0, seed=2))
    plain = plant_of(phase, TWO.model_copy(update={"classes": {}}))
    both = find_capacity(plant_of(phase), trace), find_capacity(plain, trace)
    assert both[0].rate_rps >= 0.99 * both[1].rate_rps
    assert both[0].attainment >= TWO.attainment
    how = search_settings(plain, None, (0,), -1, 0.01)
    assert capacity_key(plain, how, "t") != capacity_key(plant_of(phase), how, "t")


def test_a_class_that_the_slo_does_not_name_is_refused_and_none_is_its_own():
    trace = generate("azure-conv-like", rate_rps=4.0, duration_s=10.0, seed=3)
    named = replace(trace, classes=RequestClasses.of(["bulk"] * len(trace)))
    with pytest.raises(BiscaleError, match="requests of class 'bulk', but SLO 'interactive-batch'"):
        RequestTable.of(plant_of("prefill"), [named])
    plain = plant_of("prefill", TWO.model_copy(update={"classes": {}}))
    assert (
        RequestTable.of(plain, [named]).slo_class.size == 0
    )  # one bound for all, whatever is said
    assert not RequestTable.of(plant_of("prefill"), [trace]).slo_class.any()


@pytest.mark.parametrize(("phase", "rate_rps"), [("prefill", 9.0), ("decode", 60.0)])
def test_rows_with_tables_of_their_own_keep_the_classes_of_their_requests(phase, rate_rps):
    """The vector environment copies workloads to rows where it tells key figures."""
    plant, n = plant_of(phase), 3
    make = [generate("azure-conv-like", rate_rps=rate_rps, duration_s=8.0, seed=k) for k in (4, 5)]
    shared = RequestTable.of(plant, [mixed(trace, seed=k) for k, trace in enumerate(make)])
    rows, workloads, members = np.arange(n), np.array([1, 0, 1]), np.full(n, -1)
    own = RowTables(shared, n)
    plain, copied = Batch(plant, n, shared), Batch(plant, n, own.pool, record=True)
    plain.reset(rows, workloads, members)
    copied.reset(rows, own.take(rows, workloads, copied), members)
    assert len({tuple(own.pool.slo_class[b : b + 20]) for b in own.pool.begins}) == 2
    for k in range(300):
        for batch in (plain, copied):
            batch.step(np.full(n, np.sin(k), dtype=np.float32))
        assert np.array_equal(plain.reward, copied.reward)
    assert plain.states["violations"].max() > 0
    assert np.array_equal(plain.states["violations"], copied.states["violations"])
    alone = _alone(shared, 1)
    assert np.array_equal(alone.slo_class, shared.slo_class[shared.begins[1] :])
