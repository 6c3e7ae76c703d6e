"""Scores across scenarios."""

import math

import pytest
from evaluation_synthetic import SLO, requests_of, tiny

from biscale_env.evaluation.runs import results
from biscale_env.evaluation.stats import scores
from biscale_env.evaluation.stats.metrics import results_row

GOOD = requests_of([0.0, 1.0, 2.0], [0.1, 1.1, 2.1], [0.1, 1.1, 2.1], [10, 20, 1])
ENERGY = {"max": 100.0, "mpc": 70.0, "slack": 80.0, "oracle": 60.0}


def frame(skip=(), late=(), loads=(0.5, 0.75), seeds=(0, 1)):
    rows = []
    for load in loads:
        for seed in seeds:
            for policy, energy_j in ENERGY.items():
                if policy not in skip:
                    requests = {} if (policy, load) in late else {"requests": GOOD}
                    totals = {"energy_j": energy_j * (1 + seed)}
                    rows.append(
                        tiny(
                            policy=policy, load=load, workload_seed=seed, totals=totals, **requests
                        )
                    )
    return results.results_frame(results_row(r) for r in rows)


def test_scores_are_shares_of_the_oracles_saving():
    scored = scores.with_scores(frame()).groupby("policy")["score"].agg(["min", "max"])
    for policy, expected in {"max": 0.0, "mpc": 0.75, "slack": 0.5, "oracle": 1.0}.items():
        assert scored.loc[policy].tolist() == pytest.approx([expected, expected])


def test_no_oracle_no_score():
    assert scores.with_scores(frame(skip=("oracle",)))["score"].isna().all()


def test_table_compares_with_a_rival_on_common_workloads():
    table = scores.score_table(frame(), against="slack").set_index("policy")
    assert table.loc["mpc", "score_iqm"] == pytest.approx(0.75)
    assert table.loc["mpc", "p_better"] == 1.0
    for row, name, value in (("mpc", "score", 0.75), ("mpc", "p_better", 1.0)):
        ends = table.loc[row, [f"{name}_ci_low", f"{name}_ci_high"]]
        assert ends.tolist() == pytest.approx([value, value])  # every run has the same score
    assert table.loc["slack", ["p_better_ci_low", "p_better_ci_high"]].tolist() == [0.5, 0.5]
    assert table.loc["slack", "p_better"] == 0.5
    assert table.loc["mpc", "energy_ratio_difference"] == pytest.approx(-0.1)
    assert table.loc["mpc", "energy_ratio_difference_ci_high"] < 0


def test_policy_that_misses_once_is_not_averaged_in():
    table = scores.score_table(frame(late={("mpc", 0.75)})).set_index("policy")
    assert math.isnan(table.loc["mpc", "score_iqm"])
    assert table.loc["mpc", ["scenarios", "scenarios_met"]].tolist() == [2, 1]
    assert table.loc["slack", "score_iqm"] == pytest.approx(0.5)


def test_infeasible_scenarios_do_not_count():
    table = scores.score_table(frame(late={("max", 0.75), ("mpc", 0.75)})).set_index("policy")
    assert table.loc["mpc", ["scenarios", "scenarios_met"]].tolist() == [1, 1]
    assert table.loc["mpc", "score_iqm"] == pytest.approx(0.75)


def test_workloads_as_they_are_make_a_scenario_without_a_load():
    energies = {"max": 600.0, "mpc": 450.0, "oracle": 400.0}
    rows = [
        results_row(tiny(policy=policy, requests=GOOD, totals={"energy_j": energy_j}))
        for policy, energy_j in energies.items()
    ]
    frame = results.results_frame(rows)
    assert frame["load"].isna().all()
    table = scores.score_table(scores.with_scores(frame)).set_index("policy")  # scored once more
    assert table.loc["mpc", ["scenarios", "scenarios_met"]].tolist() == [1, 1]
    assert table.loc["mpc", "score_iqm"] == pytest.approx(0.75)
    assert (table["variant"] == "").all()


def test_attaining_exactly_what_is_asked_is_met():
    slo = SLO.model_copy(update={"attainment": 2 / 3})
    rows = [
        results_row(tiny(policy=policy, slo=slo, totals={"energy_j": energy_j}))
        for policy, energy_j in (("max", 600.0), ("oracle", 400.0))
    ]
    table = scores.score_table(results.results_frame(rows)).set_index("policy")
    assert table.loc["oracle", ["scenarios", "scenarios_met"]].tolist() == [1, 1]
