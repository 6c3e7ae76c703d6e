"""An SLO with classes: what each request is promised, and when the whole is held."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from biscale_env.config import load_slo
from biscale_env.config.loader import validate
from biscale_env.config.slo import Slo, one_bound, per_class
from biscale_env.core.errors import BiscaleError

TWO = load_slo("interactive-batch")


def test_what_a_class_does_not_say_is_the_slos_own():
    assert TWO.of_class(1).model_dump(exclude={"classes"}) == TWO.model_dump(exclude={"classes"})
    batch = TWO.of_class(2)
    assert (batch.ttft_s, batch.tpot_s, batch.attainment) == (10.0, 0.5, 0.95)
    assert TWO.of_class(0).classes == {}
    assert TWO.bounds_s("prefill", [0, 1, 2]).tolist() == [0.6, 0.6, 10.0]
    assert TWO.bounds_s("decode", [2, 1]).tolist() == [0.5, 0.1]
    assert TWO.bounds_s("decode", None) == 0.1
    assert load_slo().bounds_s("prefill", [5, 7]) == 0.6


def test_an_slo_of_one_bound_is_written_as_it_always_was():
    plain = load_slo()
    assert list(plain.model_dump()) == [
        "name", "ttft_s", "tpot_s", "attainment", "statistic", "source"
    ]  # fmt: skip
    assert Slo.model_validate_json(TWO.model_dump_json()) == TWO
    assert {load_slo(): 1}[plain] == {load_slo(TWO.name): 1}[TWO] == 1  # caches are keyed by it
    assert one_bound(plain, "x") is plain
    with pytest.raises(BiscaleError, match="the cluster: SLO 'interactive-batch' has classes"):
        one_bound(TWO, "the cluster")


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({"batch": {"ttft": 1.0}}, "unknown key 'classes.batch.ttft'"),
        ({"none": {}}, "a class is named by"),
        ({"a b": {}}, "a class is named by"),
        ({"a": {"attainment": 1.5}}, "classes.a.attainment"),
        ({f"c{k}": {} for k in range(8)}, "classes"),
    ],
)
def test_a_mistake_is_one_sentence(classes, words):
    data = {"name": "x", "ttft_s": 1, "tpot_s": 1, "attainment": 0.9, "classes": classes}
    with pytest.raises(BiscaleError, match=words):
        validate(data, Slo, "x")


counts = some.lists(
    some.tuples(some.integers(0, 500), some.integers(0, 500)).map(lambda p: (sum(p), p[1])),
    min_size=3,
    max_size=3,
)


@settings(deadline=None)
@given(counts)
def test_the_worst_off_reaches_the_target_exactly_where_every_class_holds(found):
    counted, missed = np.array(found).T
    attained, worst = TWO.worst_off(counted, missed)
    promised = [TWO.of_class(k).attainment for k in range(3)]
    held = [m <= (1 - p) * n + 1e-9 for n, m, p in zip(counted, missed, promised, strict=True)]
    assert (attained >= TWO.attainment - 1e-12) == all(held)
    if missed.sum():
        used = missed / np.maximum(counted, 1) / (1 - np.array(promised))
        assert used[worst] == pytest.approx(used.max())


@pytest.mark.slow
@settings(deadline=None)
@given(counts)
def test_with_one_promise_for_all_it_is_the_least_attainment(found):
    classes = {"a": {}, "b": {"ttft_s": 3.0}}
    slo = validate({**TWO.model_dump(), "classes": classes}, Slo, "same shares")
    counted, missed = np.array(found).T
    shares = [1 - m / n for n, m in zip(counted, missed, strict=True) if n]
    assert slo.worst_off(counted, missed)[0] == pytest.approx(min(shares, default=1.0))


def test_attainment_of_latencies_is_that_of_the_worst_off():
    latency_s = np.array([0.5, 0.7, 5.0, 11.0, np.nan])
    numbers = np.array([1, 1, 2, 2, 2])
    n, missed = per_class(numbers, ~(latency_s <= [0.6, 0.6, 10, 10, 10]), 3)
    assert (n.tolist(), missed.tolist()) == ([0, 2, 3], [0, 1, 2])
    # half of the interactive ones, where 1 % may: worse than two of three, where 5 % may
    assert TWO.attained(latency_s, "prefill", numbers) == pytest.approx(0.5)
    assert TWO.attained(latency_s[2:], "prefill", numbers[2:]) == pytest.approx(1 - 2 / 3 / 5)
    assert TWO.attained(latency_s, "prefill") == pytest.approx(1 - 4 / 5)
