"""Predictors and ablations: errors on the plant, monotone power, compiled trees, every level
controller on a foreign model.
"""

import numpy as np
import pytest
from controllers_cases import clock_of, context, encode, plant, queue, recorded
from sklearn.ensemble import HistGradientBoostingRegressor
from threadpoolctl import threadpool_limits

from biscale_env.core.errors import BiscaleError
from controllers import make_policy
from controllers.ablations import beliefs, variants
from controllers.surrogates.gbt import POWER_NOISE, boosted, features, fit_boosted, sample_work
from controllers.surrogates.trees import CompiledTrees

GRID = plant("prefill").clocks.grid_mhz


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_errors_are_no_worse_than_the_papers(phase):
    reported = {"prefill": (0.029, 0.041), "decode": (0.027, 0.010)}[phase]
    errors = boosted(context(phase)).errors
    assert 0.0 < errors["latency_mape"] <= reported[0]
    assert 0.0 < errors["power_mape"] <= reported[1]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_reported_errors_are_those_of_the_plant(phase):
    c, model = context(phase), boosted(context(phase))
    work = sample_work(c, 3000, np.random.default_rng(99))
    mape = np.mean(np.abs(model.latency_s(*work) / c.model.latency_s(*work) - 1.0))
    assert mape == pytest.approx(model.errors["latency_mape"], rel=0.15)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_power_never_falls_and_latency_never_rises_with_the_clock(phase):
    model = boosted(context(phase))
    for n in (5, 64, 200):
        work = (
            (n, 0.0, 900.0 * n, n) if phase == "decode" else (9 * n, 0.5 * (9.0 * n) ** 2, 0.0, 1)
        )
        assert np.all(np.diff(model.power_w(*work, GRID)) >= -1e-9)
        if phase == "decode":
            assert np.all(np.diff(model.latency_s(*work, GRID)) <= 1e-12)


def test_energy_is_power_times_time_of_all_gpus_and_the_optimum_is_its_argmin():
    model, w = boosted(context("decode")), (64, 0.0, 6e4, 64)
    np.testing.assert_allclose(
        model.energy_j(*w, GRID),
        4 * model.power_w(*w, GRID) * model.latency_s(*w, GRID),
        rtol=1e-12,
    )
    assert model.optimal_freq_mhz(*w) == GRID[model.energy_j(*w, GRID).argmin()]
    assert model.optimal_freq_mhz([8, 64], [0, 0], [8e3, 6e4], [8, 64]).shape == (2,)


def test_features_recover_the_statistics_of_the_lengths():
    lengths = np.array([100.0, 300.0, 50.0, 150.0])
    x = features(
        *(np.array([v]) for v in (lengths.sum(), 0.5 * (lengths**2).sum(), 0.0, 4.0, 1200.0))
    )
    np.testing.assert_allclose(
        x[0], [4, lengths.sum(), lengths.mean(), lengths.std(), 1200, lengths.sum()]
    )


def test_compiled_trees_are_the_regressor():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(800, 4))
    y = np.sin(x[:, 0]) + x[:, 1] * x[:, 2]
    with threadpool_limits(1, user_api="openmp"):
        fitted = HistGradientBoostingRegressor(
            max_iter=20, monotonic_cst=[0, 0, 1, 0], random_state=0
        ).fit(x, y)
    np.testing.assert_allclose(
        CompiledTrees(fitted).predict(x), fitted.predict(x), rtol=1e-12, atol=1e-12
    )


def test_work_is_within_what_an_engine_meets():
    for phase in ("prefill", "decode"):
        c = context(phase)
        tokens, attn, cached, n_seq, freq = sample_work(c, 2000, np.random.default_rng(1))
        assert np.all((tokens >= 1) & (n_seq >= 1) & (n_seq <= tokens) & np.isin(freq, GRID))
        assert cached.max() <= c.kv_capacity_tokens
        if phase == "prefill":
            assert tokens.max() <= c.token_budget
            assert np.all(
                (attn <= 0.5 * tokens**2 + 1e-6) & (attn >= 0.5 * tokens**2 / n_seq - 1e-6)
            )


@pytest.mark.slow
def test_the_fit_follows_its_member_and_its_seed():
    a, b = fit_boosted(context("decode"), 600, seed=1), fit_boosted(context("decode"), 600, seed=1)
    w = (64, 0.0, 6e4, 64, GRID)
    assert np.array_equal(a.latency_s(*w), b.latency_s(*w))
    truth = plant("decode").model
    other = fit_boosted(context("decode", 7), 2000)
    near = np.abs(other.power_w(*w) / truth.power_w(*w, 7) - 1.0).mean()
    assert near < 2 * POWER_NOISE
    with pytest.raises(BiscaleError, match="at least 500"):
        fit_boosted(context("decode"), 10)


@pytest.mark.parametrize(
    ("phase", "name"),
    [
        ("decode", n)
        for n in (
            "slack",
            "slack:energy_floor=true",
            "ecofreq",
            "throttllem",
            "greenllm",
            "dynamollm",
        )
    ]
    + [("prefill", n) for n in ("mpc-greedy", "ecofreq", "throttllem", "greenllm", "dynamollm")],
)
def test_level_controllers_run_on_the_predictors_and_stay_near(phase, name):
    joined = f"{name},model=boosted" if ":" in name else f"{name}:model=boosted"
    rows = recorded(phase, 40)
    with_formula, with_trees = (
        clock_of(make_policy(n, context(phase)), rows) for n in (name, joined)
    )
    assert np.mean(np.abs(with_formula - with_trees) <= 210.0) > 0.9


def test_mismatch_changes_decisions():
    """A controller that believes in a machine twice as slow asks for higher clocks."""
    truth = plant("decode").model

    class Pessimist:
        def latency_s(self, *work):
            return 2.0 * truth.latency_s(*work)

        def energy_j(self, *work):
            return 2.0 * truth.energy_j(*work)

    o = encode("decode", batch=100, cached_tokens=1e5, slo=0.032)
    assert clock_of(make_policy("slack", context("decode"), model=Pessimist()), o) > clock_of(
        make_policy("slack", context("decode")), o
    )


def test_the_mpc_refuses_a_model_that_is_not_smooth():
    with pytest.raises(BiscaleError, match="smooth model"):
        make_policy("mpc:model=boosted", context("prefill"))
    with pytest.raises(BiscaleError, match="unknown model 'guess'"):
        make_policy("slack:model=guess", context("decode"))
    far = queue([(1500, 0.99)])
    clocks = {
        member: float(clock_of(make_policy("mpc", context("prefill"), member=member), far))
        for member in range(12)
    }
    assert len(set(clocks.values())) > 3


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_variant_exists(phase):
    names = variants(phase)
    assert len(set(names.values())) == len(names) >= 8
    for name in names.values():
        make_policy(name, context(phase)).predict(recorded(phase, 2))
    with pytest.raises(BiscaleError, match="unknown phase"):
        variants("both")
    with pytest.raises(BiscaleError, match="unknown phase"):
        beliefs("both")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_belief_exists_and_some_change_decisions(phase):
    names = beliefs(phase)
    tight = [
        encode("decode", batch=n, cached_tokens=500.0 * n, slo=0.032) for n in range(10, 250, 10)
    ]
    seen = np.stack(tight) if phase == "decode" else recorded(phase, 100)
    asked = {
        label: make_policy(name, context(phase)).predict(seen)[0].tobytes()
        for label, name in names.items()
    }
    assert any(
        asked[label] != asked[label.partition(", member")[0]]
        for label in names
        if ", member" in label
    )
    assert any("fitted predictors" in label for label in names)
