"""Statistics by hand, fits that find what generated the data, shipped profiles against the real
traces.
"""

import numpy as np
import pandas as pd
import pytest

from biscale_env.core.errors import BiscaleError
from biscale_env.traces import (
    Arrivals,
    Modulation,
    Trace,
    WorkloadProfile,
    describe,
    generate,
    load_envelope,
    load_lengths,
    load_workload,
    read_trace,
)
from biscale_env.traces.synthetic.envelopes import envelope_of, fit_envelope, fold_rates, read_rates
from biscale_env.traces.synthetic.mmpp import mmpp_dispersion, mmpp_gap_cv
from biscale_env.traces.synthetic.profile_fit import fit_arrivals, fit_lengths, fit_workload

SOURCE = (
    "Azure LLM inference trace 2023 (AzurePublicDataset, CC-BY-4.0); Patel et al., Splitwise, "
    "ISCA 2024; measured"
)


def made(rate=10.0, duration=5000.0, lengths="azure-conv", seed=0, **arrivals):
    profile = WorkloadProfile(
        name="w",
        rate_rps=rate,
        duration_s=duration,
        arrivals=Arrivals(**arrivals),
        lengths=lengths,
        source="test",
    )
    return generate(profile, seed=seed)


def test_statistics_by_hand():
    trace = Trace(
        "t",
        [0.0, 0.5, 1.0, 3.0, 9.9],
        [10, 20, 30, 40, 50],
        [5, 4, 3, 2, 1],
        "here",
        duration_s=10.0,
    )
    s = describe(trace)
    assert (s.requests, s.duration_s, s.rate_rps) == (5, 10.0, 0.5)
    gaps = np.array([0.5, 0.5, 2.0, 6.9])
    assert s.gap_cv == pytest.approx(gaps.std() / gaps.mean())
    counts = np.array([2, 1, 0, 1, 0, 0, 0, 0, 0, 1])
    assert s.dispersion == {"1s": pytest.approx(counts.var() / counts.mean())}
    assert s.busiest_second_requests == 2
    assert (s.prompt_tokens.mean, s.prompt_tokens.p50, s.prompt_tokens.max) == (30.0, 30.0, 50)
    assert (s.prompt_tokens_per_s, s.output_tokens_per_s) == (15.0, 1.5)
    assert s.rank_correlation == pytest.approx(-1.0)
    assert s.as_dict()["prompt_tokens"]["p90"] == pytest.approx(46.0)


def test_rank_correlation_is_spearmans_and_ties_share_their_rank():
    trace = Trace("t", [0.0, 1.0, 2.0, 3.0], [10, 20, 20, 400], [4, 3, 2, 1], "here")
    # ranks (1, 2.5, 2.5, 4) and (4, 3, 2, 1): -4.5 / sqrt(4.5 * 5)
    assert describe(trace).rank_correlation == pytest.approx(-4.5 / np.sqrt(22.5), abs=1e-12)


def test_statistics_of_short_and_empty_traces():
    one = describe(Trace("t", [1.0], [10], [5], "here"))
    assert (one.gap_cv, one.rank_correlation, one.dispersion) == (None, None, {})
    zero = describe(Trace("t", [0.0], [10], [5], "here"))
    assert (zero.rate_rps, zero.prompt_tokens_per_s) == (0.0, 0.0)
    with pytest.raises(BiscaleError, match="no request to describe"):
        describe(Trace("t", [], [], [], "here"))


def test_fit_of_a_poisson_trace_has_no_modulation():
    fitted = fit_arrivals(made())
    assert fitted.modulation is None
    assert fitted.gap_cv == pytest.approx(1.0, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("modulation", [(3.0, 10.0, 40.0), (1.4, 200.0, 400.0), (5.0, 8.0, 32.0)])
def test_fit_finds_the_moments_of_an_mmpp(modulation):
    true = Modulation(
        **dict(zip(("high_factor", "mean_high_s", "mean_low_s"), modulation, strict=True))
    )
    trace = made(modulation=true, duration=40_000.0)
    fitted = fit_arrivals(trace)
    windows_s = np.array([1.0, 10.0, 60.0, 300.0])
    model = mmpp_dispersion(fitted.modulation, trace.rate_rps, windows_s) - 1 + fitted.gap_cv**2
    np.testing.assert_allclose(model, list(describe(trace).dispersion.values()), rtol=0.2)
    np.testing.assert_allclose(model, mmpp_dispersion(true, 10.0, windows_s), rtol=0.35)
    model_cv = np.sqrt(mmpp_gap_cv(fitted.modulation, trace.rate_rps) ** 2 - 1 + fitted.gap_cv**2)
    assert model_cv == pytest.approx(mmpp_gap_cv(true, 10.0), rel=0.15)


def test_fitted_lengths_give_the_lengths_back():
    trace = made(lengths="azure-conv")
    profile = fit_lengths(trace, "again", "test")
    again = generate("poisson-fixed", rate_rps=10.0, duration_s=5000.0, seed=9, lengths=profile)
    for field in ("prompt_tokens", "output_tokens"):
        old, new = getattr(trace, field), getattr(again, field)
        assert new.mean() == pytest.approx(old.mean(), rel=0.03)
        levels = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
        np.testing.assert_allclose(
            np.quantile(new, levels), np.quantile(old, levels), rtol=0.12, atol=3
        )
    assert np.sum(profile.rank_grid) == pytest.approx(1.0, abs=1e-3)


def test_profiles_need_enough_requests():
    few = made(duration=20.0)
    for fit in (
        fit_arrivals,
        lambda t: fit_lengths(t, "n", "s"),
        lambda t: fit_workload(t, "n", "l", "s"),
    ):
        with pytest.raises(BiscaleError, match="at least 1000"):
            fit(few)


def test_envelope_of_a_trace_and_of_a_table(tmp_path):
    trace = Trace("t", [1.0, 2.0, 11.0, 25.0], [1] * 4, [1] * 4, "here", duration_s=30.0)
    assert fit_envelope(trace, "e", "s", step_s=10.0).factors == (1.5, 0.75, 0.75)
    table = pd.DataFrame(
        {"t": [5.0, 15.0, 25.0, 35.0], "r": [1.0, 2.0, 3.0, 6.0], "m": ["a", "a", "a", "a"]}
    )
    table = pd.concat([table, table.assign(r=99.0, m="b")])
    table.to_csv(tmp_path / "r.csv", index=False)
    time_s, rate = read_rates(tmp_path / "r.csv", "t", "r", "m=a")
    assert rate.tolist() == [1.0, 2.0, 3.0, 6.0]
    folded = fold_rates(time_s, rate, 20.0, 10.0, "e", "s")
    assert folded.factors == (round(2 / 3, 4), round(4 / 3, 4))
    assert folded.period_s == 20.0


def test_bad_rate_tables(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("t,r,m\n5,1,a\nx,2,a\n")
    with pytest.raises(BiscaleError, match=r"r.csv, line 3: t and r must be numbers"):
        read_rates(path, "t", "r")
    with pytest.raises(BiscaleError, match="there is no column 'rate'; the columns are t, r, m"):
        read_rates(path, "t", "rate")
    with pytest.raises(BiscaleError, match="has no line with m=z"):
        read_rates(path, "t", "r", "m=z")
    with pytest.raises(BiscaleError, match="cannot read"):
        read_rates(tmp_path / "none.csv", "t", "r")
    times, rates = np.array([5.0, 15.0]), np.array([1.0, 2.0])
    with pytest.raises(BiscaleError, match="multiple of the step"):
        fold_rates(times, rates, 25.0, 10.0, "e", "s")
    with pytest.raises(BiscaleError, match="step 2 of 3 has no rate"):
        fold_rates(times, rates, 30.0, 10.0, "e", "s")
    with pytest.raises(BiscaleError, match="at least two steps"):
        envelope_of(np.zeros(5), "e", "s", 10.0)


SERVICES = ("conv", "code")


def real(shared_data, service):
    return read_trace(shared_data / "traces" / f"AzureLLMInferenceTrace_{service}_2023.csv")


@pytest.mark.parametrize("service", SERVICES)
def test_shipped_profiles_are_what_the_real_traces_give(shared_data, service):
    trace = real(shared_data, service)
    assert fit_lengths(trace, f"azure-{service}", SOURCE) == load_lengths(f"azure-{service}")
    shipped = load_workload(f"azure-{service}-like")
    again = fit_workload(trace, shipped.name, shipped.lengths, shipped.source)
    assert again.measured == shipped.measured
    assert again.rate_rps == shipped.rate_rps
    for key, value in shipped.arrivals.modulation.model_dump().items():
        assert getattr(again.arrivals.modulation, key) == pytest.approx(value, rel=0.02)
    assert again.arrivals.gap_cv == pytest.approx(shipped.arrivals.gap_cv, rel=0.01)


@pytest.mark.parametrize(
    ("name", "table", "column", "where"),
    [
        (
            "azure-conv-week",
            "azure2024_week_rate_digitised.csv",
            "requests_per_second",
            "service=conv",
        ),
        (
            "azure-code-week",
            "azure2024_week_rate_digitised.csv",
            "requests_per_second",
            "service=code",
        ),
        ("servegen-m-large-week", "servegen_rate_14d.csv", "total_rate", "model=m-large"),
    ],
)
def test_shipped_envelopes_are_what_the_tables_give(shared_data, name, table, column, where):
    time_s, rate = read_rates(shared_data / "traces" / table, "t_seconds", column, where)
    shipped = load_envelope(name)
    again = fold_rates(time_s, rate, 7 * 86_400.0, 3600.0, name, shipped.source, shipped.start)
    assert again == shipped


@pytest.mark.parametrize("service", SERVICES)
def test_generated_workload_resembles_the_real_trace(shared_data, service):
    """Means over seeds lie near the real figures.

    The dispersion of one hour over 300 s is too noisy to compare.
    """
    truth = describe(real(shared_data, service))
    made_up = [describe(generate(f"azure-{service}-like", seed=seed)) for seed in range(12)]

    def mean(pick):
        return float(np.mean([pick(s) for s in made_up]))

    assert mean(lambda s: s.rate_rps) == pytest.approx(truth.rate_rps, rel=0.1)
    assert mean(lambda s: s.gap_cv) == pytest.approx(truth.gap_cv, rel=0.1)
    for window, tolerance in (("1s", 0.1), ("10s", 0.15), ("60s", 0.25)):
        assert mean(lambda s, w=window: s.dispersion[w]) == pytest.approx(
            truth.dispersion[window], rel=tolerance
        )
    for field in ("prompt_tokens", "output_tokens"):
        for figure, tolerance in (("mean", 0.05), ("p50", 0.05), ("p90", 0.05), ("p99", 0.1)):
            found = mean(lambda s, f=field, g=figure: getattr(getattr(s, f), g))
            assert found == pytest.approx(getattr(getattr(truth, field), figure), rel=tolerance)
    assert mean(lambda s: s.rank_correlation) == pytest.approx(truth.rank_correlation, abs=0.03)


def test_generated_lengths_go_together_as_in_the_real_trace(shared_data):
    """The mean of prompt x output sets the KV room that decode needs.

    Independence would be 9 % off.
    """

    def together(trace):
        prompt, output = trace.prompt_tokens.astype(float), trace.output_tokens.astype(float)
        return np.mean(prompt * output) / (prompt.mean() * output.mean())

    found = np.mean([together(generate("azure-conv-like", seed=s)) for s in range(5)])
    assert found == pytest.approx(together(real(shared_data, "conv")), abs=0.02)
