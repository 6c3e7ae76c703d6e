"""The evaluation loop against the compiled constant-clock runs and against its own books."""

import time

import numpy as np
import pytest

from biscale_env.config import load_slo
from biscale_env.config.slo import within
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.loads.capacity import find_capacity, run_static
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.experiment.compare import ComparisonJob, run_job
from biscale_env.evaluation.rollouts.rollout import (
    PROBE_DECISIONS,
    _Samples,
    rollout,
    time_decisions,
)
from biscale_env.evaluation.rollouts.scenarios import Infeasible, Scenario, resolve
from biscale_env.evaluation.tuning.tuning import Setting, best_static, choose, tune
from biscale_env.traces import Trace, generate, write_trace


class Constant:
    """The same action for every row."""

    def __init__(self, action):
        self.action = action

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        return np.full((len(observation), 1), self.action, dtype=np.float32), state


class Alternating:
    """Flips between two actions.

    Keeps its phase in the state, per row, and restarts with an episode.
    """

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        count = np.zeros(len(observation), dtype=int) if state is None else state
        count = np.where(episode_start, 0, count)
        return np.where(count % 2 == 0, 1.0, -0.2).astype(np.float32)[:, None], count + 1


@pytest.fixture(scope="module", params=["prefill", "decode"])
def plant(request):
    return Plant(PlantSettings.of(request.param, actuation_delay_s=0.05, drain=True))


@pytest.fixture(scope="module")
def workloads():
    return [generate("azure-conv-like", rate_rps=1.5, duration_s=60.0, seed=s) for s in range(3)]


def test_max_clock_equals_compiled_static_run(plant, workloads):
    runs = rollout(Constant(1.0), plant, workloads)
    for run, workload in zip(runs, workloads, strict=True):
        static = run_static(plant, workload, plant.clocks.freq_max_mhz)
        assert run.totals["energy_j"] == pytest.approx(static.energy_j, rel=1e-12)
        assert run.totals["duration_s"] == pytest.approx(static.duration_s, rel=1e-12)
        assert run.totals["iterations"] == static.iterations


def test_books_balance(plant, workloads):
    for run, workload in zip(rollout(Alternating(), plant, workloads), workloads, strict=True):
        t = run.timeline
        waited = t["time_s"][0]  # before the first request, at the highest clock
        before = run.totals["energy_j"] - t["energy_j"].sum()
        assert t["duration_s"].sum() + t["idle_s"].sum() + waited == pytest.approx(
            run.totals["duration_s"], rel=1e-9
        )
        assert 0 <= before <= waited * plant.settings.tp * 700
        assert np.all(np.diff(t["time_s"]) > 0)
        kept = workload.output_tokens >= (2 if plant.phase == "decode" else 0)
        assert len(run.requests["arrival_s"]) == kept.sum() == run.totals["n_finished"]
        bound = load_slo().bound_s(plant.phase)
        latency = run.requests["finish_s"] - run.requests["arrival_s"]
        if plant.phase == "decode":
            latency = latency / (run.requests["output_tokens"] - 1)
        assert (latency > bound).sum() == run.totals["n_violations"]
        assert np.all(run.requests["start_s"] >= run.requests["arrival_s"] - 1e-9)
        assert np.all(run.requests["start_s"] <= run.requests["finish_s"])
        assert t["freq_requested_mhz"][:2] == pytest.approx([1980.0, 1098.0], abs=1e-3)


def test_reward_is_energy_and_violations(plant, workloads):
    run = rollout(Constant(-1.0), plant, workloads[:1])[0]
    weight = plant.settings.violation_weight
    expected = (
        -run.timeline["energy_j"].sum() / plant.energy_ref_j - weight * run.totals["n_violations"]
    )
    assert run.totals["reward"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_rows_do_not_disturb_each_other(plant, workloads):
    together = rollout(Alternating(), plant, workloads)
    alone = [rollout(Alternating(), plant, [w])[0] for w in workloads]
    for a, b in zip(together, alone, strict=True):
        assert a.totals["energy_j"] == b.totals["energy_j"]
        np.testing.assert_array_equal(a.requests["finish_s"], b.requests["finish_s"])


def test_prefill_starts_are_those_of_the_batches(workloads):
    plant = Plant(PlantSettings.of("prefill", token_budget=256, drain=True))
    run = rollout(Constant(1.0), plant, workloads[:1])[0]
    t, r = run.timeline, run.requests
    ends = t["time_s"] + t["duration_s"]
    assert np.all(np.isin(np.round(r["start_s"], 9), np.round(t["time_s"], 9)))
    first = np.searchsorted(t["time_s"], r["start_s"])
    last = np.searchsorted(ends, r["finish_s"] - 1e-9)
    batches = last - first + 1
    assert np.all(
        batches >= np.ceil(r["prompt_tokens"] / 256)
    )  # a long prompt needs as many chunks as that


def test_decision_times_are_of_single_decisions():
    median, p99 = time_decisions(Constant(0.0), np.zeros((50, 4), dtype=np.float32))
    assert 0 < median <= p99
    assert np.isnan(time_decisions(Constant(0.0), np.zeros((0, 4), dtype=np.float32))[0])


class Slow(Constant):
    """Asked for the first time, it compiles for a while.

    It counts what it was asked and every call as a failure.
    """

    asked = 0

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        self.asked += 1
        if self.asked == 1:
            time.sleep(0.05)
        return super().predict(observation, state, episode_start, deterministic)

    def stats(self):
        return {"solver_failures": self.asked}


def test_decision_times_leave_the_first_call_out():
    _, p99 = time_decisions(Slow(0.0), np.zeros((3, 4), dtype=np.float32))
    assert p99 < 0.05


@pytest.mark.parametrize("steps", [1, 150, 399, 400, 12345])
def test_samples_of_decisions_are_spread_over_the_whole_run(steps):
    samples = _Samples()
    for step in range(steps):
        samples.offer(step, np.array([step], dtype=np.float32))
    kept = np.concatenate(samples.kept)
    assert min(steps, PROBE_DECISIONS) <= kept.size < 2 * PROBE_DECISIONS
    assert kept[0] == 0
    assert steps - 1 - kept[-1] <= samples.stride
    assert kept.size == 1 or set(np.diff(kept)) == {samples.stride}


def test_solver_failures_are_those_of_the_run_not_of_the_probe(workloads):
    plant = Plant(PlantSettings.of("prefill", drain=True))
    policy = Slow(1.0)
    for _ in range(2):  # of this run, not since the policy was made
        run = rollout(policy, plant, workloads[:1])[0]
        assert run.totals["solver_failures"] == len(run.timeline["time_s"])


@pytest.mark.parametrize("answer", [np.zeros(3), "fast", [[0.0], [0.0]], None, {}])
def test_a_policy_that_answers_nonsense_is_one_sentence(answer, workloads):
    class Odd:
        def predict(self, observation, state=None, episode_start=None, deterministic=True):
            return answer, state

    plant = Plant(PlantSettings.of("prefill", drain=True))
    with pytest.raises(BiscaleError, match="must answer 1 observations with 1 numbers"):
        rollout(Odd(), plant, workloads[:1])


def test_job_makes_complete_records():
    scenario = Scenario(name="tiny", duration_s=30.0, seeds=2, load=0.5)
    job = ComparisonJob(
        scenario, "prefill", "mine", "outside_rule:QueueRule:low_mhz=900", 3, (0, 1)
    )
    records = run_job(job).records
    assert [r.key for r in records] == [job.key(0), job.key(1)]
    assert records[0].labels["delay_s"] == resolve(scenario, "prefill").plant.model.delay_s(3)
    asked = np.concatenate([r.timeline["freq_requested_mhz"] for r in records])
    assert set(np.round(asked)) == {900.0, 1980.0}


def test_tuned_job_uses_the_setting_that_reaches_on_other_workloads():
    scenario = Scenario(name="tiny", duration_s=60.0, seeds=1, load=0.3)
    name = "outside_rule:QueueRule"
    outcome = run_job(ComparisonJob(scenario, "prefill", "x", name, -1, (0,), variant="tuned"))
    chosen = outcome.tuned.chosen
    assert [s.params["low_mhz"] for s in outcome.tuned.tried] == [900.0, 1200.0, 1500.0]
    others = [s for s in outcome.tuned.tried if s.attainment >= outcome.tuned.target]
    assert chosen.energy_j == min(s.energy_j for s in others)
    record = outcome.records[0]
    assert record.labels["setting"] == f"low_mhz={chosen.params['low_mhz']}"
    asked = record.timeline["freq_requested_mhz"]
    assert asked.min() == pytest.approx(chosen.params["low_mhz"])


def test_static_best_is_cheapest_of_those_that_reach():
    case = resolve(Scenario(name="tiny", duration_s=120.0, load=0.5), "decode")
    tuned = best_static(case, seeds=(0,))
    reaching = [s for s in tuned.tried if s.attainment >= 0.99]
    assert tuned.reached
    assert tuned.chosen.energy_j == min(s.energy_j for s in reaching)
    assert tuned.chosen.energy_j < tuned.tried[0].energy_j  # the first is the highest clock
    clocks = [s.params["freq_mhz"] for s in tuned.tried]
    assert max(clocks) == 1980
    assert min(clocks) < 600


def test_tune_equals_static_search_on_the_same_clocks():
    case = resolve(Scenario(name="tiny", duration_s=60.0, load=0.5, delay_s=0.0), "prefill")
    grid = [{"action": 1.0}, {"action": 0.3}, {"action": -0.5}]
    tuned = tune(lambda p, plant, traces: Constant(p["action"]), case, grid, seeds=(0, 1))
    loads = [case.tuning_workload(s) for s in (0, 1)]
    for setting in tuned.tried:
        freq = float(case.plant.clocks.to_freq_mhz(setting.params["action"]))
        static = sum(run_static(case.plant, w, freq).energy_j for w in loads)
        assert setting.energy_j == pytest.approx(
            static, rel=0.02
        )  # the rollout starts at the highest clock


def test_choose_prefers_reaching_then_cheap():
    a, b, c = Setting({}, 3.0, 0.995), Setting({}, 2.0, 0.99), Setting({}, 1.0, 0.5)
    assert choose([a, b, c], 0.99).chosen is b
    assert choose([a, b, c], 0.999).chosen is a
    assert not choose([a, b, c], 0.999).reached
    with pytest.raises(BiscaleError, match="no setting"):
        choose([], 0.99)


def test_tuning_and_table_workloads_are_different():
    case = resolve(Scenario(name="tiny", duration_s=60.0), "prefill")
    assert case.workload(0) != case.tuning_workload(0)
    assert case.workload(0) == case.workload(0)
    assert case.workload(0) != case.workload(1)


@pytest.mark.parametrize(("phase", "bound_s"), [("prefill", 0.15), ("decode", 0.0172)])
def test_compiled_code_counts_the_violations_that_the_slo_names(phase, bound_s, workloads):
    """The simulator counts while it runs, the evaluation judges what was recorded.

    One verdict on every request.
    """
    slo = load_slo().model_copy(update={"ttft_s": bound_s, "tpot_s": bound_s})
    plant = Plant(PlantSettings.of(phase, drain=True), slo)
    for run, workload in zip(rollout(Constant(1.0), plant, workloads), workloads, strict=True):
        latency_s = run_static(plant, workload, plant.clocks.freq_max_mhz).latency_s
        missed = int((~within(latency_s, bound_s)).sum())
        assert run.totals["n_violations"] == missed
        assert 0.05 < missed / len(latency_s) < 0.95


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_tuning_sees_the_first_part_of_a_trace_only_and_tables_the_rest(phase, tmp_path):
    """The two parts of the file are told apart by their prompts.

    Under 500 tokens in the first quarter, over 500 after it.
    """
    rng, n = np.random.default_rng(0), 4000
    arrival_s = np.sort(rng.uniform(0.0, 1000.0, n))
    first = arrival_s < 0.25 * arrival_s[-1]
    prompt = np.where(first, rng.integers(100, 500, n), rng.integers(501, 900, n)).astype(np.int32)
    file = write_trace(
        Trace("halves", arrival_s, prompt, np.full(n, 20, np.int32), "test"),
        tmp_path / "halves.csv",
    )
    scenario = Scenario(
        name="halves", trace=str(file), load=0.3, tune_fraction=0.25, duration_s=300.0
    )
    case = resolve(scenario, phase)
    for seed in range(2):
        tuned, shown = case.tuning_workload(seed), case.workload(seed)
        assert tuned.prompt_tokens.max() < 500
        assert shown.prompt_tokens.min() > 500
        assert min(len(tuned), len(shown)) > 100
        assert shown.duration_s == pytest.approx(300.0)  # of the 750 s that there are


def test_load_is_a_share_of_capacity():
    half, most = (
        resolve(Scenario(name="x", duration_s=60.0, load=load), "prefill") for load in (0.5, 0.9)
    )
    assert half.capacity == most.capacity
    assert most.rate_rps / half.rate_rps == pytest.approx(1.8)


def test_workloads_carry_the_load_they_are_named_after():
    case = resolve(Scenario(name="x", duration_s=300.0, load=0.5), "decode")
    for made in (case.workload(0), case.workload(1), case.tuning_workload(0)):
        assert made.rate_rps == pytest.approx(case.rate_rps, rel=0.05)


def test_everybody_is_tuned_on_the_same_workloads():
    """The best static clock, and a policy whose settings are those clocks, must come to the same
    energies.
    """
    case = resolve(Scenario(name="x", duration_s=1200.0, load=0.5, delay_s=0.0), "prefill")
    static = {s.params["freq_mhz"]: s for s in best_static(case).tried}
    grid = [{"freq_mhz": 1980.0}, {"freq_mhz": 1395.0}]
    tuned = tune(
        lambda p, plant, _: Constant(float(plant.clocks.to_action(p["freq_mhz"]))), case, grid
    )
    for setting in tuned.tried:
        other = static[setting.params["freq_mhz"]]
        assert setting.energy_j == pytest.approx(other.energy_j, rel=0.01)
        assert setting.attainment == pytest.approx(other.attainment, abs=0.002)


def halves_of(tmp_path, prompts):
    """A trace whose halves have prompts of their own length."""
    calm = generate("azure-conv-like", rate_rps=2.0, duration_s=600.0, seed=0)
    long = np.where(calm.arrival_s > 300.0, prompts[1], prompts[0])
    path = tmp_path / "halves.csv"
    rows = (f"{t},{p},5" for t, p in zip(calm.arrival_s, long, strict=True))
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(rows))
    return str(path)


@pytest.mark.parametrize("fold", ["forward", "backward"])
def test_the_load_of_each_part_is_a_share_of_its_own_capacity(tmp_path, fold):
    """The evaluated half serves several times more than the other: 90 % is 90 % of each."""
    trace = halves_of(tmp_path, (3000, 300))
    case = resolve(Scenario(name="h", trace=trace, load=0.9, fold=fold), "prefill")
    (easy,), (hard,) = case.judged.traces, case.tuning.traces
    rates = case.rate_rps, case.tune_rate_rps
    if fold == "backward":
        easy, hard, rates = hard, easy, rates[::-1]
    assert set(easy.prompt_tokens) == {300}
    assert set(hard.prompt_tokens) == {3000}
    assert rates[0] > 2 * rates[1]
    for part, rate in ((easy, rates[0]), (hard, rates[1])):
        assert rate == pytest.approx(0.9 * find_capacity(case.plant, part).rate_rps)
    assert case.workload(0).rate_rps == pytest.approx(case.rate_rps, rel=0.1)
    assert case.tuning_workload(0).rate_rps == pytest.approx(case.tune_rate_rps, rel=0.1)


def test_a_part_that_nobody_can_serve_is_named(tmp_path):
    trace = halves_of(tmp_path, (60000, 300))
    with pytest.raises(Infeasible, match="on the tuning part of the trace"):
        resolve(Scenario(name="h", trace=trace, tp=8), "prefill")
    with pytest.raises(Infeasible, match="on the evaluated part of the trace"):
        resolve(Scenario(name="h", trace=trace, tp=8, fold="backward"), "prefill")


def test_other_seeds_are_other_workloads():
    first = Scenario(name="x", duration_s=60.0, seeds=2)
    later = first.model_copy(update={"first_seed": 7})
    case, other = resolve(first, "prefill"), resolve(later, "prefill")
    assert other.workload_seeds() == (7, 8)
    assert other.workloads()[0] == case.workload(7)
    assert case.workloads()[0] != other.workloads()[0]


def test_infeasible_scenario_is_named(tmp_path):
    slo = tmp_path / "impossible.yaml"
    slo.write_text("name: impossible\nttft_s: 0.001\ntpot_s: 0.1\nattainment: 0.99\n")
    with pytest.raises(BiscaleError, match=r"infeasible.*misses SLO .*impossible.*at max clock"):
        resolve(Scenario(name="x", duration_s=60.0, slo=str(slo)), "prefill")
