"""Tier 1 on tables made by hand.

The ILP against brute force, DistServe against enumeration, errors that explain.
"""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from controllers.placement.ilp import (
    PHASES,
    CapacityEntry,
    CapacityTable,
    at_clocks,
    biscale_plan,
    distserve_plan,
    max_rate_rps,
    plan_row,
)


def table(*rows):
    return CapacityTable(tuple(CapacityEntry(*r) for r in rows), "biscale", "made by hand")


SMALL = table(
    ("prefill", 4, 1980.0, 20.0, 100.0),
    ("prefill", 4, 1200.0, 12.0, 70.0),
    ("decode", 4, 1980.0, 10.0, 200.0),
    ("decode", 4, 1200.0, 8.0, 150.0),
    ("decode", 8, 1200.0, 18.0, 160.0),
)


def brute_force(tab, rate, gpus, alpha):
    """Cheapest feasible cost over every vector of counts; None: none is feasible."""
    entries = tab.usable()
    best = None
    for counts in product(*[range(gpus // e.tp + 1) for e in entries]):
        if sum(n * e.tp for n, e in zip(counts, entries, strict=True)) > gpus:
            continue
        served = {
            p: sum(n * e.rate_rps for n, e in zip(counts, entries, strict=True) if e.phase == p)
            for p in PHASES
        }
        if min(served.values()) < (1 + alpha) * rate - 1e-9:
            continue
        cost = sum(n * e.power_w for n, e in zip(counts, entries, strict=True))
        best = cost if best is None else min(best, cost)
    return best


one_entry = st.tuples(
    st.sampled_from(PHASES),
    st.sampled_from([2, 4]),
    st.sampled_from([810.0, 1200.0, 1980.0]),
    st.floats(0.5, 30.0),
    st.floats(10.0, 500.0),
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(one_entry, min_size=2, max_size=6),
    rate=st.floats(0.5, 40.0),
    gpus=st.sampled_from([4, 8, 12]),
    alpha=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_ilp_is_brute_force(rows, rate, gpus, alpha):
    tab = table(*rows)
    want = brute_force(tab, rate, gpus, alpha)
    if want is None:
        with pytest.raises(BiscaleError, match="no placement on"):
            biscale_plan(tab, rate, gpus, alpha)
        return
    plan = biscale_plan(tab, rate, gpus, alpha)
    assert plan.power_w == pytest.approx(want, rel=1e-6)
    assert plan.placement.gpus <= gpus
    assert plan.goodput_rps >= (1 + alpha) * rate * (1 - 1e-6)
    assert rate * (1 + alpha) <= max_rate_rps(tab, gpus) * (1 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(one_entry, min_size=1, max_size=6), gpus=st.sampled_from([4, 8, 12]))
def test_max_rate_is_brute_force(rows, gpus):
    tab = table(*rows)
    entries = tab.usable()
    best = 0.0
    for counts in product(*[range(gpus // e.tp + 1) for e in entries]):
        if sum(n * e.tp for n, e in zip(counts, entries, strict=True)) <= gpus:
            served = [
                sum(n * e.rate_rps for n, e in zip(counts, entries, strict=True) if e.phase == p)
                for p in PHASES
            ]
            best = max(best, min(served))
    assert max_rate_rps(tab, gpus) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_known_answer():
    """10 requests/s on 16 GPUs, alpha 0.1.

    One slow prefill, and TP8 decode beats two of TP4 by energy.
    """
    plan = biscale_plan(SMALL, 10.0, 16, 0.1)
    assert plan.placement.label() == "P 1 x TP4 @ 1200; D 2 x TP4 @ 1200"
    assert plan.power_w == pytest.approx(12 * 70 + 16 * 150)
    assert plan.headroom == pytest.approx(0.2)
    assert biscale_plan(SMALL, 16.0, 16, 0.1).placement.shape()["decode", 8] == 1
    assert [g.weight for g in plan.placement.groups] == [12.0, 8.0]
    assert plan_row(plan)["gpus"] == 12


def test_charging_spare_gpus_can_change_the_answer():
    """Once an idle GPU costs as much as it saves, spreading out is no dearer."""
    cheap_wide = table(
        ("prefill", 2, 1980.0, 10.0, 100.0),
        ("decode", 2, 1980.0, 10.0, 100.0),
        ("decode", 4, 810.0, 10.0, 110.0),
    )
    assert biscale_plan(cheap_wide, 9.0, 8, 0.0).placement.gpus == 4
    assert biscale_plan(cheap_wide, 9.0, 8, 0.0, spare_w=72.0).placement.gpus == 6


def test_distserve_takes_the_largest_goodput_at_the_highest_clock():
    """By hand: (1, 3), (2, 2) and (3, 1) instances of TP4 serve 20, 20 and 10 requests/s.

    (1, 3) can do 20 of 30.
    """
    plan = distserve_plan(SMALL, 5.0, 16)
    assert {g.freq_mhz for g in plan.placement.groups} == {1980.0}
    assert plan.goodput_rps == pytest.approx(20.0)
    best = max(
        min(n_p * 20.0, n_d * 10.0)
        for n_p in range(1, 5)
        for n_d in range(1, 5)
        if 4 * (n_p + n_d) <= 16
    )  # fmt: skip
    assert plan.goodput_rps == best
    assert distserve_plan(SMALL, 5.0, 8).placement.shape() == {("prefill", 4): 1, ("decode", 4): 1}


def test_distserve_does_not_look_at_lower_clocks():
    """Not even where the bisection made a lower clock look better."""
    noisy = table(
        ("prefill", 4, 1980.0, 20.0, 100.0),
        ("prefill", 4, 1200.0, 21.0, 70.0),
        ("decode", 4, 1980.0, 10.0, 200.0),
        ("decode", 4, 1200.0, 11.0, 150.0),
    )
    plan = distserve_plan(noisy, 5.0, 16)
    assert {g.freq_mhz for g in plan.placement.groups} == {1980.0}
    assert plan.goodput_rps == pytest.approx(20.0)


def test_at_clocks_keeps_the_instances():
    plan = at_clocks(
        distserve_plan(SMALL, 5.0, 16), SMALL, {"prefill": 1200.0, "decode": 1980.0}, "static"
    )
    assert plan.capacity_rps["prefill"] == 12.0
    useless = table(
        *[
            (e.phase, e.tp, e.freq_mhz, 0.0 if e.freq_mhz < 1980 else 9.0, 1.0)
            for e in SMALL.entries
        ]
    )
    slow = at_clocks(
        distserve_plan(SMALL, 5.0, 16), useless, dict.fromkeys(PHASES, 1200.0), "too slow"
    )
    assert slow.goodput_rps == 0.0  # still a placement: the run will show that it misses the SLO
    with pytest.raises(BiscaleError, match="no decode TP4 at 900 MHz"):
        at_clocks(plan, SMALL, {"prefill": 1200.0, "decode": 900.0}, "static")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: biscale_plan(SMALL, 30.0, 16), "at most 18.18 requests/s are possible"),
        (lambda: biscale_plan(SMALL, 1.0, 4), "need 8 GPUs"),
        (
            lambda: biscale_plan(
                table(("prefill", 4, 1.0, 5.0, 1.0), ("decode", 4, 1.0, 0.0, 0.0)), 1.0, 16
            ),
            "no decode",
        ),
        (lambda: biscale_plan(SMALL, -1.0, 16), "positive number"),
        (lambda: biscale_plan(SMALL, float("nan"), 16), "positive number"),
        (lambda: biscale_plan(SMALL, 1.0, 0), "at least one GPU"),
        (lambda: biscale_plan(SMALL, 1.0, 16, -2.0), "above -1"),
        (lambda: distserve_plan(SMALL, 1.0, 4), "need 8 GPUs"),
    ],
)
def test_impossible_requests_are_explained(make, says):
    with pytest.raises(BiscaleError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_ilp_speed():
    """A full table (4 TP x 7 clocks x 2 phases) is solved within a second."""
    import time

    rng = np.random.default_rng(0)
    rows = [
        (phase, tp, f, float(tp * f / 1000 * rng.uniform(1, 2)), float(rng.uniform(30, 90)))
        for phase in PHASES
        for tp in (1, 2, 4, 8)
        for f in (810.0, 1005.0, 1200.0, 1395.0, 1605.0, 1800.0, 1980.0)
    ]
    start = time.perf_counter()
    biscale_plan(table(*rows), 12.0, 16)
    assert time.perf_counter() - start < 1.0
