"""Searching settings: a grid, refined where the target lies, on made-up policies and real ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.evaluation.rollouts.scenarios import Scenario, resolve
from biscale_env.evaluation.stats.targets import judged_target as rule
from biscale_env.evaluation.tuning import settings_search
from biscale_env.evaluation.tuning.judged_curves import (
    hindsight_static,
    judged_target,
    policy_curve,
    static_curve,
)
from biscale_env.evaluation.tuning.member_spread import constant_clock, member_runs
from biscale_env.evaluation.tuning.settings_search import (
    COARSE,
    Setting,
    bracket,
    search,
    thinned,
)
from biscale_env.evaluation.tuning.tuning import best_static, choose, tune_seeds
from controllers.base import MARGINS


@pytest.fixture
def pretend(monkeypatch):
    """Settings answer with a formula instead of a simulation; counts how many were asked."""
    asked = []

    def install(energy_j, attainment):
        def of(params, runs, plant):
            return Setting(dict(params), energy_j(params), attainment(params))

        monkeypatch.setattr(settings_search, "rollout", lambda *a, **k: [])
        monkeypatch.setattr(settings_search, "setting_of", of)
        return lambda params, plant, traces: asked.append(dict(params))

    install.asked = asked
    return install


@given(st.floats(0.02, 0.78))
def test_the_search_closes_in_on_the_target(knee):
    """Attainment rises and energy too with the margin: the best setting is the knee itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings_search, "rollout", lambda *a, **k: [])
        patch.setattr(
            settings_search,
            "setting_of",
            lambda p, *_: Setting(dict(p), 1.0 + p["margin"], 0.99 + 0.05 * (p["margin"] - knee)),
        )
        grid = [{"margin": m} for m in MARGINS["margin"]]
        tried = search(lambda *a: None, None, [], grid, 0.99)
    assert len(tried) <= COARSE + settings_search.HALVINGS
    best = choose(tried, 0.99)
    assert best.reached
    # a step of the thinned grid is 0.2 at most
    assert -1e-9 <= best.chosen.params["margin"] - knee <= 0.2 / 2**settings_search.HALVINGS + 1e-9


def test_refining_keeps_the_other_parameters_and_takes_the_cheaper_of_two_ways(pretend):
    def energy(p):
        return (1.0 if p["clock"] == "low" else 2.0) + p["margin"]

    build = pretend(energy, lambda p: 0.95 + 0.1 * p["margin"])
    grid = [{"margin": m, "clock": c} for m in (0.0, 0.8) for c in ("high", "low")]
    tried = search(build, None, [], grid, 0.99)
    refined = tried[len(grid) :]
    assert refined
    assert {one.params["clock"] for one in refined} == {"low"}
    assert choose(tried, 0.99).chosen.params["margin"] == pytest.approx(0.4)


def test_whole_numbers_stay_whole(pretend):
    build = pretend(lambda p: float(p["k"]), lambda p: 1.0 if p["k"] >= 5 else 0.0)
    tried = search(build, None, [], [{"k": 0}, {"k": 8}], 0.99)
    assert [one.params["k"] for one in tried] == [0, 8, 4, 6, 5]
    assert all(isinstance(one.params["k"], int) for one in tried)


@pytest.mark.parametrize(("attained", "why"), [(1.0, "above"), (0.0, "below")])
def test_nothing_is_refined_where_the_target_lies_outside(pretend, attained, why):
    build = pretend(lambda p: p["margin"], lambda p: attained)
    assert len(search(build, None, [], [{"margin": 0.0}, {"margin": 0.8}], 0.99)) == 2


def test_the_grid_is_thinned_to_eight_with_both_ends():
    grid = [{"margin": m, "idle": i} for m in MARGINS["margin"] for i in (0, 1)]
    kept = thinned([*grid, {"other": 1.0}], "margin")
    values = sorted({one["margin"] for one in kept if "margin" in one})
    assert len(values) == COARSE
    assert values[0] == 0.0
    assert values[-1] == 0.8
    assert {"other": 1.0} in kept
    assert sum("margin" in one for one in kept) == 2 * COARSE


def test_a_setting_without_the_main_parameter_is_no_neighbour():
    low, high = Setting({"margin": 0.0}, 1.0, 0.9), Setting({"margin": 0.5}, 2.0, 1.0)
    other = Setting({"explore": 0.3}, 1.5, 0.99)
    assert bracket([high, other, low], "margin", 0.99) == (low, high)
    assert bracket([high, other], "margin", 0.99) is None


@pytest.fixture(scope="module")
def decode():
    return resolve(Scenario(name="tiny", duration_s=240.0, load=0.75, seeds=2), "decode")


def test_hindsight_is_the_cheapest_clock_of_the_judged_workloads(decode):
    judged = decode.workloads()
    found = hindsight_static(decode, judged, -1)
    assert found.target == judged_target(decode, judged, -1) == decode.plant.slo.attainment
    others = [one for one in found.tried if one.attainment >= found.target]
    assert found.chosen.energy_j == min(one.energy_j for one in others)
    tuned = best_static(decode).chosen.params["freq_mhz"]
    (same,) = [one for one in found.tried if one.params["freq_mhz"] == tuned]
    assert same.energy_j >= found.chosen.energy_j or same.attainment < found.target


def test_where_max_clock_misses_the_target_is_less(decode):
    hard = resolve(decode.scenario.model_copy(update={"load": 1.4}), "decode")
    (top,) = settings_search.static_settings(hard.plant, hard.workloads(), clocks=(1980.0,))
    assert top.attainment < 0.99
    assert judged_target(hard, hard.workloads(), -1) == rule(0.99, top.attainment) < top.attainment


@pytest.mark.slow
def test_curves_hold_totals_of_every_window_and_workload(decode):
    judged = decode.workloads()
    curve = static_curve(decode, judged, -1, 1200.0)
    assert {1185.0, 1200.0, 1215.0} <= {one.params["freq_mhz"] for one in curve}
    rule_curve = policy_curve("slack", [{"margin": m} for m in (0.0, 0.4)], decode, judged, -1)
    for one in (*curve, *rule_curve):
        assert [w.energy_j.size for w in one.windows] == [2, 2]
        assert sum(w.energy_j.sum() for w in one.windows) == pytest.approx(one.energy_j)
        met, counted = (
            sum(getattr(w, n).sum() for w in one.windows) for n in ("n_met", "n_counted")
        )
        assert met / counted == pytest.approx(one.attainment)


def test_members_are_other_plants_with_the_same_setting(decode):
    judged = decode.workloads()[:1]
    runs = member_runs("slack:margin=0.2", decode.plant, judged, 3)
    assert [run.member for run in runs] == [0, 1, 2]
    assert len({run.energy_j for run in runs}) == 3
    fast = member_runs("static:1200", decode.plant, judged, 1)[0].energy_j
    slow = member_runs("static:freq_mhz=1200", decode.plant, judged, 1)[0].energy_j
    assert fast == pytest.approx(slow, rel=0.01)  # one compiled call, or step by step
    assert member_runs("oracle", decode.plant, judged, 3) == []
    everyone = decode.plant.model.n_members
    assert len(member_runs("max", decode.plant, judged, everyone + 5)) == everyone
    assert constant_clock("max", decode.plant) == 1980.0
    assert constant_clock("slack", decode.plant) is None


def test_as_many_workloads_tune_as_are_judged_but_never_fewer_than_three(decode):
    assert len(tune_seeds(decode)) == 3
    many = resolve(decode.scenario.model_copy(update={"seeds": 5}), "decode")
    assert len(tune_seeds(many)) == 5
