"""The oracles with SLO classes: against brute force, and equal to one bound where all are alike."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_helpers import every_end, trace_of

from biscale_env.config import Slo
from biscale_env.envs.batch import RequestTable
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.traces.request_classes import RequestClasses
from controllers.oracle import decode_cuts
from controllers.oracle import prefill_records as records
from controllers.oracle.allowed_misses import AllowedMisses, missed_by_class
from controllers.oracle.decode_bound import DecodeFluid
from controllers.oracle.make import make_oracle
from controllers.oracle.prefill_optimum import solve_prefill_oracle
from controllers.oracle.prefill_problem import PrefillProblem

CLOCKS_MHZ = (990.0, 1485.0, 1980.0)
STEP_MHZ = 495.0
FEW_CUTS = {"N_SIZES": 3, "N_CLOCKS": 2, "CONTEXTS": (1.0,)}  # as valid as more, and quicker
NAMES = (None, "fast", "slow")
OWN = {"ttft_s": 0.25, "tpot_s": 0.03, "attainment": 0.8}
TWO = Slo(
    name="two",
    **OWN,
    classes={
        "fast": {"ttft_s": 0.1, "tpot_s": 0.018},
        "slow": {"ttft_s": 0.7, "tpot_s": 0.1, "attainment": 0.4},
    },
)
ALIKE = Slo(name="alike", **OWN, classes={"fast": {}, "slow": {}})
PLAIN = Slo(name="plain", **OWN)


def plant_with(phase, slo, price=5.0, **changes):
    values = {"drain": True, "actuation_delay_s": 0.0, "violation_weight": price, **changes}
    return Plant(PlantSettings.of(phase, **values), slo)


def traces(most, longest=2500, outputs=(2, 2)):
    """Small traces whose requests have classes, or none."""
    one = st.tuples(
        st.sampled_from([0.0, 0.07, 0.4]),
        st.integers(200, longest),
        st.integers(*outputs),
        st.sampled_from(NAMES),
    )

    def made(rows):
        gaps, prompts, answers, names = zip(*rows, strict=True)
        trace = trace_of(gaps, prompts, np.array(answers), tail_s=0.5)
        return replace(trace, classes=RequestClasses.of(names))

    return st.lists(one, min_size=1, max_size=most).map(made)


def ends_of(plant, trace, clocks_mhz):
    """Cost, energy (J) and misses of each class of every sequence of clocks."""
    found = []
    for batch, cost, energy_j in every_end(plant, trace, clocks_mhz):
        _, missed = missed_by_class(plant.slo, plant.phase, batch.pool, batch.finish_s)
        assert missed.sum() == batch.states["violations"][0]
        found.append((cost, energy_j, missed))
    return found


@settings(max_examples=12, deadline=None)
@given(traces(3), st.sampled_from([0.3, 5.0]))
def test_the_prefill_programme_equals_brute_force(trace, price):
    plant = plant_with("prefill", TWO, price)
    best = min(cost for cost, _, _ in ends_of(plant, trace, CLOCKS_MHZ))
    problem = PrefillProblem(plant, trace, clock_step_mhz=STEP_MHZ, slots=64, window_cells=1 << 18)
    exact, _ = problem.run(records.EXACT, price, 2e-5, np.inf)
    assert float(exact["best_cost"]) == pytest.approx(best, rel=1e-9)
    bound, _ = problem.run(records.CELLS, price, 1e-3, np.inf)
    assert float(bound["best_cost"]) <= best + 1e-9


@settings(max_examples=8, deadline=None)
@given(traces(3), st.sampled_from([0.7, 0.8, 1.0]))
def test_no_sequence_that_holds_every_class_uses_less_than_the_prefill_bound(trace, attainment):
    plant = plant_with("prefill", TWO)
    problem = PrefillProblem(plant, trace)
    allowed = AllowedMisses.of(TWO, problem.pool, attainment)
    found = solve_prefill_oracle(plant, trace, attainment, clock_step_mhz=STEP_MHZ)
    held = [e for _, e, missed in ends_of(plant, trace, CLOCKS_MHZ) if allowed.holds(missed)]
    if held:
        assert found.feasible
        assert allowed.holds(found.replay.missed)
        assert found.replay.attainment >= attainment - 1e-9
        assert found.energy_bound_j <= min(held) + problem.energy_before_j + 1e-6
    else:
        assert not found.feasible


@settings(max_examples=6, deadline=None)
@given(traces(2, 900, (2, 5)), st.sampled_from([0.05, 2.0]))
def test_no_sequence_beats_the_decode_bound(trace, price):
    plant = plant_with("decode", TWO, price, max_seqs=2)
    ends = ends_of(plant, trace, (600.0, 1980.0))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW_CUTS.items():
            patch.setattr(decode_cuts, name, value)
        fluid = DecodeFluid(plant, trace, window_s=0.05)
    assert fluid.cost(price) <= min(cost for cost, _, _ in ends) + 1e-9
    for _, energy_j, missed in ends:
        assert fluid.energy_j(missed) <= energy_j + fluid.before_j + 1e-6


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("attainment", [None, 0.8])
def test_classes_that_are_all_alike_change_nothing(phase, attainment):
    rng = np.random.default_rng(1)
    trace = trace_of(rng.choice([0.0, 0.1, 0.5], 8), rng.integers(100, 2500, 8), np.full(8, 12))
    told = replace(trace, classes=RequestClasses.of([NAMES[k % 3] for k in range(8)]))
    (plan, plain), (also, alike) = (
        make_oracle(plant_with(phase, slo), work, attainment)
        for slo, work in ((PLAIN, trace), (ALIKE, told))
    )
    if attainment is None:  # a promise to each class is more than one to all
        for name in ("replay_j", "violations", "lower_bound_j", "price"):
            assert alike[name] == pytest.approx(plain[name], rel=1e-12), name
        np.testing.assert_array_equal(also.plan_mhz, plan.plan_mhz)
    else:
        assert alike["lower_bound_j"] >= plain["lower_bound_j"] * (1 - 1e-3)
        assert alike["attainment"] >= 0.8 or not alike["feasible"]


def test_what_an_attainment_allows():
    trace = trace_of(np.full(20, 0.1), np.full(20, 500))
    names = ["slow"] * 10 + ["fast"] * 6 + [None] * 4
    pool = RequestTable.of(
        plant_with("prefill", TWO), [replace(trace, classes=RequestClasses.of(names))]
    )
    # of the SLO's own 20 %: none of 4, 1 of 6 fast ones; slow ones may miss three times as many
    allowed = AllowedMisses.of(TWO, pool, 0.8)
    assert allowed.counts.tolist() == [0, 1, 6]
    assert allowed.weights == pytest.approx([1.0, 1.0, 1.0 / 3.0])
    assert allowed.weighted == pytest.approx(1.0 + 2.0)
    assert allowed.holds([0, 1, 6])
    assert not allowed.holds([1, 0, 0])
    assert allowed.beyond([1, 0, 9]) == pytest.approx(2.0)
    assert allowed.within_weight(2.0).tolist() == [2, 2, 6]
    assert AllowedMisses.of(TWO, pool, None).counts.tolist() == [4, 6, 10]
