"""Plans that come with the package: what the oracle finds, and used only while they are that."""

import numpy as np
import pytest
from oracle_helpers import plant_of

from biscale_env.evaluation.rollouts.scenarios import resolve
from biscale_env.evaluation.suite.tasks import load_suite
from biscale_env.traces import generate
from controllers.oracle import kept_plans, shipped_plans
from controllers.oracle.kept_plans import kept_oracle, plan_key
from controllers.oracle.make import make_oracle
from controllers.oracle.shipped_plans import NO_PLANS, pack_plans, read_plans, shipped_plan

SUITE = load_suite("core")
TRACE = generate("azure-conv-like", rate_rps=1.0, duration_s=20.0, seed=0)


def asked(task):
    """What a benchmark asks the oracle on a task: plant, workload, attainment, member."""
    case = resolve(task.scenario, task.tier)
    for seed in case.workload_seeds(SUITE.oracle_seeds[task.tier]):
        for member in task.scenario.members:
            yield case.plant, case.workload(seed), case.plant.slo.attainment, member


@pytest.mark.slow
def test_every_task_of_the_suite_has_its_plans_and_no_plan_is_left_over():
    keys = set()
    for task in SUITE.tasks():
        for plant, trace, target, member in asked(task):
            key = plan_key(plant, trace, target, member)
            assert shipped_plan(key, plant, trace, member), f"python docs/update.py plans: {task}"
            keys.add(key)
    assert keys == set(read_plans())


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", ["prefill/conversations at 50 %", "decode/conversations at 90 %"]
)  # of each tier the one that is solved soonest
def test_a_shipped_plan_is_what_the_oracle_finds(key):
    task = next(task for task in SUITE.tasks() if task.key == key)
    plant, trace, target, member = next(asked(task))
    plan, said = read_plans()[plan_key(plant, trace, target, member)]
    policy, found = make_oracle(plant, trace, target, member)
    for name in ("replay_j", "lower_bound_j", "lower_bound_any_delay_j"):
        assert found[name] == pytest.approx(said[name], rel=1e-6)
    assert found["violations"] == said["violations"]
    assert len(policy.plan_mhz) == len(plan)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """One plan, kept in the user's cache and packed as if it had come with the package."""
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path / "first"))
    plant = plant_of("prefill", drain=True)
    policy, said = kept_oracle(plant, TRACE, 0.99)
    path = tmp_path / "plans.npz"
    assert pack_plans((tmp_path / "first").rglob("oracle-plans/*/*.json"), path) == 1
    monkeypatch.setattr(shipped_plans, "read_plans", lambda: read_plans(path))
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path / "second"))
    return plant, policy, said


def test_a_packed_plan_comes_back_and_nothing_is_solved(shipped, monkeypatch):
    plant, policy, said = shipped
    monkeypatch.setattr(kept_plans, "make_oracle", None)
    again, same = kept_oracle(plant, TRACE, 0.99)
    np.testing.assert_array_equal(policy.plan_mhz, again.plan_mhz)
    np.testing.assert_equal(said, same)


@pytest.mark.parametrize("changed", ["replay_j", "violations"])
def test_a_plan_that_the_simulator_no_longer_repeats_is_solved_again(shipped, changed, monkeypatch):
    plant, _, said = shipped
    key = plan_key(plant, TRACE, 0.99, None)
    plan, info = shipped_plans.read_plans()[key]
    moved = {key: (plan, info | {changed: info[changed] * (1 + 1e-6) + (changed == "violations")})}
    monkeypatch.setattr(shipped_plans, "read_plans", lambda: moved)
    assert shipped_plan(key, plant, TRACE) is None
    assert kept_oracle(plant, TRACE, 0.99)[1]["replay_j"] == said["replay_j"]


def test_shipped_plans_can_be_switched_off(shipped, monkeypatch):
    plant, _, _ = shipped
    key = plan_key(plant, TRACE, 0.99, None)
    assert shipped_plan(key, plant, TRACE)
    monkeypatch.setenv(NO_PLANS, "1")
    assert shipped_plan(key, plant, TRACE) is None


def test_no_file_is_no_plan(tmp_path):
    assert read_plans(tmp_path / "none.npz") == {}
