"""The Trace: its rules, windows, splits and loads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.traces import Trace


def make(times, prompt=None, output=None, **kwargs):
    n = len(times)
    prompt = np.arange(1, n + 1) if prompt is None else prompt
    output = np.arange(n, 0, -1) if output is None else output
    return Trace(
        "t", np.array(times, dtype=float), np.array(prompt), np.array(output), "test", **kwargs
    )


def poisson(n=2000, rate=4.0, seed=0):
    rng = np.random.default_rng(seed)
    return make(
        np.cumsum(rng.exponential(1 / rate, n)), rng.integers(1, 9000, n), rng.integers(1, 900, n)
    )


# no subnormal gaps: half of 5e-324 s is zero, and a trace that short has no halves
traces = st.lists(st.floats(0, 1e4, allow_subnormal=False), min_size=1, max_size=60).map(
    lambda gaps: make(np.cumsum(gaps))
)


def requests(trace):
    return sorted(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True))


def test_fields_have_fixed_types_and_cannot_be_changed():
    times = np.array([0.5, 1.0])
    trace = Trace("t", times, [3, 4], [1, 2], "test")
    times[0] = 99.0
    assert trace.arrival_s.tolist() == [0.5, 1.0]
    assert (trace.arrival_s.dtype, trace.prompt_tokens.dtype, trace.output_tokens.dtype) == (
        np.float64,
        np.int32,
        np.int32,
    )
    with pytest.raises(ValueError, match="read-only"):
        trace.prompt_tokens[0] = 7
    with pytest.raises(AttributeError):
        trace.name = "other"


def test_duration_and_rate():
    trace = make([1.0, 2.0, 4.0])
    assert (trace.duration_s, trace.rate_rps, len(trace)) == (4.0, 0.75, 3)
    longer = make([1.0, 2.0, 4.0], duration_s=6.0)
    assert (longer.duration_s, longer.rate_rps) == (6.0, 0.5)
    empty = make([])
    assert (len(empty), empty.duration_s, empty.rate_rps) == (0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("times", "prompt", "output", "words"),
    [
        ([0.0, np.nan], [1, 1], [1, 1], "request 1: arrival_s is missing"),
        ([0.0, np.inf], [1, 1], [1, 1], "request 1: arrival_s is missing or not a finite number"),
        ([-1.0, 2.0], [1, 1], [1, 1], "request 0: arrival_s is -1 s"),
        ([3.0, 1.0], [1, 1], [1, 1], "request 1: arrival_s lies 2 s before"),
        ([0.0, 1.0], [1, 0], [1, 1], "request 1: prompt_tokens is 0"),
        ([0.0, 1.0], [1, 1], [1, -5], "request 1: output_tokens is -5"),
        ([0.0, 1.0], [1, 1.5], [1, 1], "request 1: prompt_tokens is 1.5"),
        ([0.0, 1.0], [1, np.nan], [1, 1], "request 1: prompt_tokens is missing"),
        ([0.0, 1.0], [1, 3e9], [1, 1], "request 1: prompt_tokens is 3e"),
        ([0.0, 1.0], [1], [1, 1], "equally long"),
        ([[0.0, 1.0]], [[1, 1]], [[1, 1]], "one-dimensional"),
    ],
)
def test_rules_are_enforced_and_the_request_is_named(times, prompt, output, words):
    with pytest.raises(BiscaleError, match=words):
        Trace("t", np.array(times), np.array(prompt), np.array(output), "test")


def test_duration_must_cover_the_arrivals():
    with pytest.raises(
        BiscaleError, match="duration_s 2 must not lie before the last arrival at 4 s"
    ):
        make([1.0, 4.0], duration_s=2.0)


def test_equal_work_has_equal_digest_whatever_its_name():
    trace = poisson(50)
    same = Trace(
        "other name", trace.arrival_s, trace.prompt_tokens, trace.output_tokens, "elsewhere"
    )
    other = Trace("t", trace.arrival_s, trace.prompt_tokens, trace.output_tokens + 1, "test")
    assert trace == same
    assert hash(trace) == hash(same)
    assert trace != other
    assert trace != "t"


def test_window_is_half_open_rebased_and_keeps_lines():
    trace = make([0.0, 1.0, 2.0, 3.0, 4.0], first_line=2)
    cut = trace.window(1.0, 3.0)
    assert cut.arrival_s.tolist() == [0.0, 1.0]
    assert cut.prompt_tokens.tolist() == [2, 3]
    assert (cut.duration_s, cut.first_line) == (2.0, 3)
    assert trace.window(1.0, 99.0).arrival_s.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert trace.window(1.0, 99.0).duration_s == 3.0


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (2, 2), (3, 2), (50, 60), (float("nan"), 2)])
def test_impossible_windows(start, end):
    with pytest.raises(BiscaleError, match="does not lie within"):
        make([0.0, 4.0]).window(start, end)


@given(traces, st.floats(0.01, 0.99))
def test_split_loses_nothing(trace, fraction):
    if trace.duration_s == 0:
        return
    head, tail = trace.split(fraction)
    assert len(head) + len(tail) == len(trace)
    assert head.duration_s + tail.duration_s == pytest.approx(trace.duration_s)
    times = np.concatenate([head.arrival_s, tail.arrival_s + head.duration_s])
    np.testing.assert_allclose(times, trace.arrival_s, atol=1e-9 * max(1.0, trace.duration_s))
    assert (
        np.concatenate([head.prompt_tokens, tail.prompt_tokens]).tolist()
        == trace.prompt_tokens.tolist()
    )


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0])
def test_split_needs_a_proper_fraction(fraction):
    with pytest.raises(BiscaleError, match="between 0 and 1"):
        make([0.0, 4.0]).split(fraction)


def test_down_sampling_chooses_requests_and_leaves_them_alone():
    trace = poisson()
    less = trace.scaled_to(trace.rate_rps * 0.4, seed=1)
    index = np.searchsorted(trace.arrival_s, less.arrival_s)
    assert (trace.arrival_s[index] == less.arrival_s).all()
    assert (trace.prompt_tokens[index] == less.prompt_tokens).all()
    assert (trace.output_tokens[index] == less.output_tokens).all()
    assert less.duration_s == trace.duration_s


@given(st.floats(0.05, 4.0), st.integers(0, 1000))
@settings(max_examples=40)
def test_scaled_rate_is_within_binomial_error(multiple, seed):
    trace = poisson()
    scaled = trace.scaled_to(multiple * trace.rate_rps, seed)
    p = multiple - np.floor(multiple)
    sigma = np.sqrt(len(trace) * p * (1 - p))
    assert abs(len(scaled) - multiple * len(trace)) <= 5 * sigma + 1
    assert (np.diff(scaled.arrival_s) >= 0).all()
    assert scaled.arrival_s[0] >= 0
    assert scaled.arrival_s[-1] <= trace.duration_s == scaled.duration_s


@given(traces, st.integers(1, 4), st.integers(0, 9))
def test_whole_multiples_are_whole_copies(trace, copies, seed):
    if trace.rate_rps == 0 or trace.rate_rps * copies == np.inf:
        return
    scaled = trace.scaled_to(trace.rate_rps * copies, seed)
    # rate * copies / rate may round to just below copies, which thins the last copy with
    # probability 1e-16
    assert requests(scaled) == sorted(requests(trace) * copies)


def test_copies_are_shifted_circularly_in_time_order():
    trace = poisson(400)
    doubled = trace.scaled_to(2 * trace.rate_rps, seed=5)
    original = np.isin(doubled.arrival_s, trace.arrival_s)
    assert original.sum() == len(trace)
    shifted = doubled.prompt_tokens[~original].tolist()
    start = next(
        k for k in range(len(trace)) if np.roll(trace.prompt_tokens, -k).tolist() == shifted
    )
    assert 0 < start < len(trace)
    gaps = np.diff(doubled.arrival_s[~original])
    ring = np.diff(np.append(trace.arrival_s, trace.arrival_s[0] + trace.duration_s))
    np.testing.assert_allclose(gaps, np.roll(ring, -start)[:-1], atol=1e-9)


def test_own_rate_gives_the_trace_itself():
    trace = poisson(100)
    assert trace.scaled_to(trace.rate_rps, seed=3) == trace


@given(st.floats(0.05, 3.0), st.floats(0.05, 3.0), st.integers(0, 20))
@settings(max_examples=30)
def test_higher_loads_contain_lower_ones(first, second, seed):
    trace = poisson(300)
    low, high = (trace.scaled_to(m * trace.rate_rps, seed) for m in sorted((first, second)))
    assert set(low.arrival_s.tolist()) <= set(high.arrival_s.tolist())
    assert len(low) <= len(high)


def test_scaling_is_deterministic_in_its_seed_and_leaves_the_global_state():
    trace = poisson(300)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert trace.scaled_to(3.0, 7) == trace.scaled_to(3.0, 7)
    assert trace.scaled_to(3.0, 7) != trace.scaled_to(3.0, 8)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_scaling_keeps_bursts_and_never_stretches_time():
    burst = make(np.sort(np.concatenate([np.linspace(100, 101, 500), np.linspace(0, 1000, 500)])))
    half = burst.scaled_to(burst.rate_rps / 2, seed=0)
    inside = ((half.arrival_s >= 100) & (half.arrival_s <= 101)).sum()
    assert inside == pytest.approx(250, abs=5 * np.sqrt(125))


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_rates(rate):
    with pytest.raises(BiscaleError, match="must be positive"):
        poisson(10).scaled_to(rate, 0)


def test_an_empty_trace_cannot_be_scaled_and_a_huge_rate_is_refused():
    with pytest.raises(BiscaleError, match="no rate to scale"):
        make([]).scaled_to(1.0, 0)
    with pytest.raises(BiscaleError, match="seed must be"):
        poisson(10).scaled_to(1.0, -1)
    with pytest.raises(BiscaleError, match="over 100000000 requests"):
        poisson(10).scaled_to(1e12, 0)


def test_check_fits_names_the_line_and_both_lengths():
    trace = make([0.0, 1.0, 2.0], prompt=[10, 90, 95], output=[5, 10, 20], first_line=2)
    assert trace.check_fits(115) is trace
    with pytest.raises(
        BiscaleError,
        match=r"^test, line 4: prompt_tokens 95 \+ output_tokens 20 do not fit into 114",
    ):
        trace.check_fits(114)
    with pytest.raises(
        BiscaleError, match=r"request 2: prompt_tokens 95 do not fit into 94 tokens"
    ):
        make([0.0, 1.0, 2.0], prompt=[10, 90, 95]).check_fits(94, with_output=False)
    assert trace.check_fits(95, with_output=False) is trace
