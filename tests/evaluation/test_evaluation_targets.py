"""The attainment that controllers are tuned to and judged by."""

import math

import pytest
from evaluation_synthetic import requests_of, tiny

from biscale_env.evaluation.experiment.compare import ComparisonJob, settle
from biscale_env.evaluation.report import tables
from biscale_env.evaluation.rollouts.scenarios import Scenario, resolve
from biscale_env.evaluation.runs import results
from biscale_env.evaluation.stats.metrics import results_row
from biscale_env.evaluation.stats.targets import ALLOWANCE, judged_target, tuning_target
from biscale_env.evaluation.tuning.tuning import max_clock

GOOD = requests_of([0.0, 1.0, 2.0], [0.1, 1.1, 2.1], [0.1, 1.1, 2.1], [10, 20, 1])


@pytest.mark.parametrize(
    ("best", "tuned", "judged"),
    [
        (1.0, 0.992, 0.99),  # room to spare: the SLO's own, with a reserve of a fifth of the misses
        (0.9935, 0.992, 0.99),
        (
            0.9925,
            0.9915,
            0.99,
        ),  # the reserve is out of reach: what max clock attains less the allowance
        (0.99, 0.989, 0.99),
        (0.985, 0.984, 0.984),  # max clock itself misses the SLO
        (math.nan, 0.992, 0.99),  # unknown
    ],
)
def test_targets_by_hand(best, tuned, judged):
    if not math.isnan(best):
        assert tuning_target(0.99, best) == pytest.approx(tuned)
    assert judged_target(0.99, best) == pytest.approx(judged)


def test_the_allowance_scales_with_the_slo():
    assert judged_target(0.9, 0.85) == pytest.approx(0.85 - 0.1 * ALLOWANCE)


def test_tuning_aims_at_what_max_clock_attains_on_the_tuning_workloads():
    scenario = Scenario(name="tiny", duration_s=120.0, load=1.3)
    case = resolve(scenario, "prefill")
    job = ComparisonJob(scenario, "prefill", "static-best", "static-best", -1, (0,))
    _, _, tuned, top = settle(job, case, case.workloads())
    assert top == max_clock(case)
    assert top.attainment < 0.99  # beyond capacity
    assert tuned.target == pytest.approx(top.attainment - 0.001)
    assert tuned.reached


def test_beside_a_max_clock_that_misses_controllers_are_judged_by_it():
    frame = results.results_frame(
        results_row(r)
        for r in (
            tiny(policy="max"),
            tiny(policy="same"),
            tiny(policy="good", requests=GOOD),
            tiny(policy="other", load=0.5),
        )
    )
    summary = results.summarise(frame).set_index("policy")
    assert not summary.loc["same", "slo_met"]
    assert summary.loc["same", "target"] == pytest.approx(summary.loc["max", "attainment"] - 0.001)
    assert summary.loc[["max", "same", "good"], "target_met"].all()
    assert summary.loc["other", "target"] == 0.99  # no max clock beside it: the SLO's own
    assert not summary.loc["other", "target_met"]
    text = tables.verdict(summary.loc[["max", "same", "good"]].reset_index())
    assert text.startswith("Infeasible: max clock itself reaches only")
    assert "least energy among those that hold it: " in text
