"""Generated workloads: closed forms of the arrivals, copulas of the lengths, determinism."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, spearmanr

from biscale_env.config.loader import validate
from biscale_env.core.errors import BiscaleError
from biscale_env.traces import (
    Arrivals,
    LengthProfile,
    Modulation,
    RateEnvelope,
    Trace,
    WorkloadProfile,
    describe,
    generate,
    load_envelope,
    load_lengths,
    load_workload,
    with_lengths,
)
from biscale_env.traces.synthetic.arrival_times import (
    PiecewiseRate,
    envelope_rate,
    markov_rate,
    renewal_points,
)
from biscale_env.traces.synthetic.lengths import sample_lengths
from biscale_env.traces.synthetic.mmpp import mmpp_dispersion, mmpp_gap_cv
from biscale_env.traces.synthetic.profiles import profile_names
from biscale_env.traces.trace_statistics import counts_per_window, dispersion, gap_cv

BURSTY = Modulation(high_factor=3.0, mean_high_s=10.0, mean_low_s=40.0)


def workload(rate=10.0, duration=2000.0, lengths="fixed", **arrivals):
    return WorkloadProfile(
        name="w",
        rate_rps=rate,
        duration_s=duration,
        arrivals=Arrivals(**arrivals),
        lengths=lengths,
        source="test",
    )


def test_poisson_gaps_are_exponential_and_counts_are_poisson():
    trace = generate(workload(rate=20.0), seed=1)
    assert abs(len(trace) - 40_000) < 5 * 200
    assert kstest(np.diff(trace.arrival_s) * 20.0, "expon").pvalue > 1e-3
    for window_s in (1.0, 10.0):
        noise = 5 * np.sqrt(2 / (trace.duration_s / window_s))
        assert dispersion(trace, window_s) == pytest.approx(1.0, abs=noise)


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.0])
def test_gamma_gaps_have_their_cv_and_shape(cv):
    trace = generate(workload(rate=20.0, gap_cv=cv), seed=2)
    gaps = np.diff(trace.arrival_s) * 20.0
    assert gap_cv(trace) == pytest.approx(cv, rel=0.05)
    assert kstest(gaps, "gamma", args=(1 / cv**2, 0, cv**2)).pvalue > 1e-3
    # for long windows the dispersion of a renewal process tends to the squared CV of its gaps
    assert dispersion(trace, 10.0) == pytest.approx(cv**2, rel=0.35)


def test_renewal_process_is_stationary_from_its_start():
    # of a stationary renewal process, the time to the first point has mean (1 + cv^2) / 2 mean gaps
    first = [renewal_points(2.0, 50.0, np.random.default_rng(s))[0] for s in range(1500)]
    assert np.mean(first) == pytest.approx(2.5, rel=0.15)
    counts = [renewal_points(2.0, 10.0, np.random.default_rng(s)).size for s in range(1500)]
    assert np.mean(counts) == pytest.approx(10.0, abs=5 * np.std(counts) / np.sqrt(1500))


def test_mmpp_has_the_dispersion_and_gap_cv_of_its_closed_form():
    windows_s = (1.0, 10.0, 60.0)
    traces = [
        generate(workload(rate=8.0, duration=20_000.0, modulation=BURSTY), seed=s) for s in range(4)
    ]
    for window_s in windows_s:
        found = np.mean([dispersion(t, window_s) for t in traces])
        assert found == pytest.approx(float(mmpp_dispersion(BURSTY, 8.0, window_s)), rel=0.1)
    assert np.mean([gap_cv(t) for t in traces]) == pytest.approx(mmpp_gap_cv(BURSTY, 8.0), rel=0.05)
    assert np.mean([t.rate_rps for t in traces]) == pytest.approx(8.0, rel=0.1)


def test_closed_forms_in_their_limits():
    # equal rates: Poisson; on-off: a renewal process, so the dispersion tends to the squared CV of
    # the gaps
    calm = Modulation(high_factor=1.0, mean_high_s=5.0, mean_low_s=5.0)
    assert mmpp_gap_cv(calm, 4.0) == pytest.approx(1.0)
    np.testing.assert_allclose(mmpp_dispersion(calm, 4.0, [0.1, 10.0]), 1.0)
    onoff = Modulation(high_factor=5.0, mean_high_s=10.0, mean_low_s=40.0)
    assert onoff.low_factor == 0.0
    assert float(mmpp_dispersion(onoff, 4.0, 1e9)) == pytest.approx(
        mmpp_gap_cv(onoff, 4.0) ** 2, rel=1e-6
    )
    assert float(mmpp_dispersion(onoff, 4.0, 1e-6)) == pytest.approx(1.0, abs=1e-4)


@given(st.floats(1.0, 1.9), st.floats(0.5, 50.0), st.integers(0, 99))
@settings(max_examples=25)
def test_modulation_has_mean_one_and_covers_the_time(factor, stay_s, seed):
    modulation = Modulation(high_factor=factor, mean_high_s=stay_s, mean_low_s=stay_s)
    mean = (
        modulation.high_share * modulation.high_factor
        + (1 - modulation.high_share) * modulation.low_factor
    )
    assert mean == pytest.approx(1.0)
    path = markov_rate(modulation, 100.0, np.random.default_rng(seed))
    assert (path.edges_s[0], path.edges_s[-1]) == (0.0, 100.0)
    assert (np.diff(path.edges_s) > 0).all()
    assert len(path.rate) == len(path.edges_s) - 1
    if factor > 1:
        assert (np.diff(path.rate) != 0).all()


def test_modulation_starts_in_its_stationary_state():
    started_high = [
        markov_rate(BURSTY, 1.0, np.random.default_rng(s)).rate[0] > 1 for s in range(2000)
    ]
    assert np.mean(started_high) == pytest.approx(0.2, abs=5 * np.sqrt(0.16 / 2000))


def test_rates_multiply():
    a = PiecewiseRate(np.array([0.0, 1.0, 4.0]), np.array([2.0, 3.0]))
    b = PiecewiseRate(np.array([0.0, 2.0, 4.0]), np.array([5.0, 7.0]))
    product = a * b
    assert product.edges_s.tolist() == [0.0, 1.0, 2.0, 4.0]
    assert product.rate.tolist() == [10.0, 15.0, 21.0]
    assert product.cumulative().tolist() == [0.0, 10.0, 25.0, 67.0]


def test_diurnal_counts_follow_the_envelope():
    envelope = load_envelope("azure-conv-week")
    trace = generate(workload(rate=2.0, duration=7 * 86_400.0, envelope="azure-conv-week"), seed=0)
    per_hour = counts_per_window(trace, 3600.0)
    factors = np.array(envelope.factors)
    assert np.corrcoef(per_hour, factors)[0, 1] > 0.99
    assert len(trace) == pytest.approx(2.0 * 7 * 86_400, rel=0.01)
    np.testing.assert_allclose(per_hour / 7200.0, factors, atol=0.12)


def test_envelope_starts_where_told_repeats_and_has_mean_one_over_the_duration():
    envelope = RateEnvelope(name="e", step_s=100.0, factors=(0.0, 1.0, 2.0, 1.0), source="test")
    rate = envelope_rate(envelope, 0.0, 800.0)
    at = rate.at(np.array([50.0, 150.0, 250.0, 350.0, 450.0, 100.0]))
    np.testing.assert_allclose(at, [0.0, 1.0, 2.0, 1.0, 0.0, 0.5], atol=0.07)
    assert rate.cumulative()[-1] == pytest.approx(800.0)
    late = envelope_rate(envelope, 200.0, 100.0)
    assert late.rate.max() / late.rate.min() == pytest.approx(2 / 1.5, rel=0.1)
    silent = RateEnvelope(name="s", step_s=100.0, factors=(0.0, 0.0, 0.0, 0.0, 5.0), source="test")
    with pytest.raises(BiscaleError, match="is zero from 100 s on"):
        envelope_rate(silent, 100.0, 200.0)


def test_same_seed_same_workload_other_seed_other_workload():
    profile = workload(lengths="azure-conv", gap_cv=1.5, modulation=BURSTY)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert generate(profile, seed=5) == generate(profile, seed=5)
    assert generate(profile, seed=5) != generate(profile, seed=6)
    assert generate(profile, seed=0) == generate(profile)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_lengths_do_not_depend_on_the_arrivals_and_the_other_way_round():
    poisson, gamma = (
        generate(workload(lengths="azure-conv")),
        generate(workload(lengths="azure-conv", gap_cv=2.0)),
    )
    other = generate(workload(lengths="azure-code"))
    assert (poisson.arrival_s == other.arrival_s).all()
    assert poisson.arrival_s[0] != gamma.arrival_s[0]


@given(st.floats(0.1, 50.0), st.floats(1.0, 200.0), st.integers(0, 2**63))
@settings(max_examples=25)
def test_generated_traces_obey_the_schema(rate, duration, seed):
    trace = generate("azure-code-like", rate_rps=rate, duration_s=duration, seed=seed)
    assert trace.duration_s == duration
    assert (trace.arrival_s < duration).all()
    assert trace.prompt_tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate_rps": 0.0}, "must be positive"),
        ({"duration_s": -1.0}, "must be positive"),
        ({"rate_rps": float("nan")}, "must be positive"),
        ({"rate_rps": 1e9}, "more than 100000000 requests"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_impossible_requests(changes, words):
    with pytest.raises(BiscaleError, match=words):
        generate("poisson-fixed", **changes)


def lengths(correlation=0.0, grid=None):
    uniform = {"kind": "quantiles", "levels": [0, 1], "tokens": [1, 100_000]}
    data = {"name": "l", "prompt_tokens": uniform, "output_tokens": uniform, "source": "test"}
    return LengthProfile(**data, rank_correlation=correlation, rank_grid=grid)


@pytest.mark.parametrize("correlation", [-0.8, 0.0, 0.5, 0.95])
def test_gaussian_copula_has_the_rank_correlation(correlation):
    prompt, output = sample_lengths(lengths(correlation), 40_000, np.random.default_rng(0))
    assert spearmanr(prompt, output).statistic == pytest.approx(correlation, abs=0.02)
    for tokens in (prompt, output):
        assert kstest(tokens / 100_000, "uniform").pvalue > 1e-3


def test_rank_grid_shapes_dependence_that_correlation_cannot_see():
    # a cross: every rank correlates with its mirror image as well as with itself, so Spearman's
    # figure is 0
    cross = np.maximum(np.eye(10), np.eye(10)[::-1]) / 20
    profile = lengths(grid=tuple(tuple(row) for row in cross))
    prompt, output = (
        t / 100_000 for t in sample_lengths(profile, 40_000, np.random.default_rng(0))
    )
    assert spearmanr(prompt, output).statistic == pytest.approx(0.0, abs=0.02)
    on_cross = (abs(prompt - output) < 0.1001) | (abs(prompt + output - 1) < 0.1001)
    assert on_cross.all()
    for tokens in (prompt, output):
        assert kstest(tokens, "uniform").pvalue > 1e-3


def test_lognormal_lengths_have_their_mean_and_limit():
    profile = load_lengths("sharegpt-like")
    prompt, output = sample_lengths(profile, 100_000, np.random.default_rng(0))
    assert output.mean() == pytest.approx(338, rel=0.02)
    assert prompt.mean() == pytest.approx(161, rel=0.02)
    assert output.std() / output.mean() == pytest.approx(1.0, rel=0.1)
    assert prompt.min() >= 1
    assert max(prompt.max(), output.max()) <= 2048


def test_lengths_of_the_authors_have_the_figures_of_their_sample():
    """Figures of the 8,000 conversations, not of the quantiles that the profile keeps of them."""
    pair = sample_lengths(load_lengths("sharegpt-pd"), 200_000, np.random.default_rng(0))
    for tokens, mean, median, p99 in zip(pair, (772, 195), (717, 83), (1915, 991), strict=True):
        assert tokens.mean() == pytest.approx(mean, rel=0.015)
        assert np.quantile(tokens, 0.5) == pytest.approx(median, rel=0.02)
        assert np.quantile(tokens, 0.99) == pytest.approx(p99, rel=0.02)
    # quantiles that the profile does not hold
    assert np.quantile(pair[0], [0.33, 0.67, 0.87]) == pytest.approx([439, 996, 1468], rel=0.02)
    assert np.quantile(pair[1], [0.33, 0.67, 0.87]) == pytest.approx([25, 247, 448], rel=0.04)
    assert spearmanr(*pair).statistic == pytest.approx(-0.13, abs=0.01)


@pytest.mark.parametrize(("name", "factor"), [("mean", 1.0), ("peak", 3.0)])
def test_code_like_hours_of_2024_are_where_their_names_say(name, factor):
    """Rate relative to the week's mean of 27.78 requests/s, and no burst beyond Poisson's."""
    profile = load_workload(f"azure-code-2024-{name}")
    trace = generate(profile)
    assert trace.rate_rps / 27.78 == pytest.approx(factor, rel=0.05)
    assert describe(trace).gap_cv == pytest.approx(1.0, abs=0.02)
    factors = np.array(load_envelope("azure-code-week").factors)
    there = np.interp(profile.arrivals.start_s / 3600, np.arange(factors.size), factors)
    assert there == pytest.approx(factor, rel=0.05)
    if name == "peak":
        assert there > 0.98 * factors.max()


def test_fixed_lengths_are_fixed():
    trace = generate("poisson-fixed")
    assert set(trace.prompt_tokens.tolist()) == {1024}
    assert set(trace.output_tokens.tolist()) == {128}


def test_real_arrivals_with_other_lengths():
    base = generate("azure-code-like", duration_s=200.0, rate_rps=10.0)
    changed = with_lengths(base, "sharegpt-like", seed=3)
    assert (changed.arrival_s == base.arrival_s).all()
    assert changed.prompt_tokens.max() <= 2048
    assert changed == with_lengths(base, load_lengths("sharegpt-like"), seed=3)
    assert "sharegpt-like" in changed.source


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (
            Modulation,
            {"high_factor": 6.0, "mean_high_s": 10, "mean_low_s": 40},
            "must not exceed 1 / high share = 5",
        ),
        (RateEnvelope, {"name": "e", "step_s": 1, "factors": [1, 3], "source": "x"}, "mean of 1"),
        (
            RateEnvelope,
            {"name": "e", "step_s": 1, "factors": [-1, 3], "source": "x"},
            "greater than or equal to 0",
        ),
        (Arrivals, {"gap_cv": 0}, "gap_cv"),
        (Arrivals, {"gab_cv": 1}, "nearest known key is 'gap_cv'"),
    ],
)
def test_profiles_are_validated(model, data, words):
    with pytest.raises(BiscaleError, match=words):
        validate(data, model, "test.yaml")


@pytest.mark.parametrize(
    ("levels", "tokens", "words"),
    [
        ([0, 0.5], [1, 2], "rise from 0 to 1"),
        ([0, 0.5, 0.5, 1], [1, 2, 3, 4], "rise from 0 to 1"),
        ([0, 1], [1, 2, 3], "one for each"),
        ([0, 1], [0, 2], "start at 1"),
        ([0, 1], [5, 2], "must not fall"),
    ],
)
def test_quantiles_are_validated(levels, tokens, words):
    side = {"kind": "quantiles", "levels": levels, "tokens": tokens}
    data = {"name": "l", "prompt_tokens": side, "output_tokens": side, "source": "x"}
    with pytest.raises(BiscaleError, match=words):
        validate(data, LengthProfile, "test.yaml")
    good = {"kind": "quantiles", "levels": [0, 1], "tokens": [1, 2]}
    with pytest.raises(BiscaleError, match="sum to 1"):
        validate(
            {**data, "prompt_tokens": good, "output_tokens": good, "rank_grid": [[1, 0], [1, 0]]},
            LengthProfile,
            "t",
        )


def test_every_shipped_profile_generates_and_fits_a_long_context():
    names = profile_names()
    assert {"azure-conv-like", "azure-code-like", "poisson-fixed"} <= set(names)
    for name in names:
        trace = generate(name, duration_s=500.0)
        assert isinstance(trace, Trace)
        trace.check_fits(131_072)
        assert describe(trace).requests == len(trace)
        assert load_workload(name).source
    for name in profile_names("lengths-"):
        assert load_lengths(name).source
    for name in profile_names("rates-"):
        weeks = 2 if name.endswith("fortnight") else 1
        assert load_envelope(name).period_s == weeks * 7 * 86_400
    with pytest.raises(
        BiscaleError, match="unknown length profile 'none'; known: azure-code, azure-conv"
    ):
        load_lengths("none")
