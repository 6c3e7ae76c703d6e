"""The price method on its own.

Its assumptions, optimality, the meaning of its stages, against the simulator.
"""

import gymnasium as gym
import numpy as np
import pytest
from controllers_cases import clock_of, context, plant, queue, recorded
from hypothesis import given, settings
from hypothesis import strategies as st

import biscale_env  # noqa: F401 - registers the environments
from biscale_env.models import load_model, physics
from controllers import make_policy
from controllers.prefill.mpc_dual import FastMpcController
from controllers.prefill.mpc_options import FAR_S, MpcOptions
from controllers.prefill.mpc_problem import LATE_W, MpcProblem

MODEL = plant("prefill").model
SCALE = plant("prefill").spec.scale
WORK = [(n, a) for n in (1, 16, 128, 512, 2048) for a in (0.5 * n * n, 8000.0 * n)]


# experts and windows; experts alone; windows alone
FAMILIES = {"gpt-oss-20b": "mxfp4", "qwen3-30b-a3b": "bf16", "gemma-3-12b": "bf16"}


def prices(member, tokens, attn_work, model=MODEL):
    """Marginal price of time (J saved per second) over the clocks from the energy-optimal one to
    the cap.
    """
    c = model.member(member)
    f = np.linspace(0.51, 1.98, 400)
    latency = physics.latency_s(c, tokens, attn_work, 0.0, 1.0, f)
    energy = c.n_gpus * physics.iteration_energy_j(c, tokens, attn_work, 0.0, 1.0, latency, f)
    price = -np.gradient(energy, f) / np.gradient(latency, f)
    allowed = (energy <= 1.001 * c.n_gpus * c.p_cap_w * latency) & (f > f[energy.argmin()] + 0.01)
    return price[allowed]


@pytest.mark.parametrize("member", [-1, *range(0, MODEL.n_members, 3)])
def test_energy_is_convex_in_time_and_the_penalty_is_exact_in_every_member(member):
    for tokens, attn_work in WORK:
        price = prices(member, tokens, attn_work)
        assert np.all(np.diff(price) > 0.0)
        assert price.max() < LATE_W / 2


@pytest.mark.parametrize("llm", FAMILIES)
def test_energy_is_convex_in_time_with_experts_and_windows(llm):
    model = load_model("prefill", 1, FAMILIES[llm], f"h100-sxm/{llm}")
    for member in (-1, *range(0, model.n_members, 9)):
        for tokens, attn_work in WORK:
            price = prices(member, tokens, attn_work, model)
            assert np.all(np.diff(price) > 0.0)
            assert price.max(initial=0.0) < LATE_W / 2


def plans(rows, **options):
    policy = make_policy("mpc", context("prefill"), **options)
    stages = policy.problem.stages(rows * SCALE)
    return policy.problem, stages, policy.plan_ghz(stages)


ALL = {"delay_aware": True, "forecast": 1.0, "margin": 0.1, "idle_credit": 1.0}


@pytest.mark.parametrize("options", [{}, ALL, {"idle_clock": 1.0}, ALL | {"idle_clock": 0.5}])
def test_no_other_plan_is_better(options):
    problem, stages, plan = plans(recorded("prefill", 200, rate_rps=5.0, seed=3), **options)
    best = problem.objective_j(stages, plan)
    rng = np.random.default_rng(0)
    top = np.maximum(stages["cap_ghz"], problem.freq_min_ghz)
    for width in (1e-3, 1e-2, 0.1, 0.5):
        for _ in range(60):
            other = np.clip(
                plan + rng.normal(0.0, width, plan.shape) * (rng.random(plan.shape) < 0.4),
                problem.freq_min_ghz,
                top,
            )
            assert np.all(problem.objective_j(stages, other) >= best * (1.0 - 1e-7) - 1e-3)


def test_clocks_stay_between_the_lowest_and_the_cap():
    problem, stages, plan = plans(recorded("prefill", 300, rate_rps=5.0, seed=4))
    used = stages["share"] > 0
    assert np.all(plan[used] <= stages["cap_ghz"][used] + 1e-12)
    assert np.all(plan >= problem.freq_min_ghz)
    assert used.sum() > 300


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(50, 2048), st.floats(0.05, 0.9))
def test_equal_batches_under_one_last_deadline_share_one_clock(count, tokens, slack):
    batches = [(tokens, 9.999)] * (count - 1) + [(tokens, slack)]
    problem, stages, plan = plans(queue(batches)[None])
    done = np.cumsum(problem.durations_s(stages, plan)[0])[count - 1]
    assert np.ptp(plan[0, :count]) < 1e-4
    deadline = stages["deadline_s"][0, count - 1]
    at_cap = float(np.sum(problem.durations_s(stages, np.maximum(stages["cap_ghz"], 0.51))))
    assert done <= max(deadline, at_cap) + 1e-6


def test_a_later_tight_deadline_speeds_up_the_batch_before_it():
    lazy = clock_of(make_policy("mpc", context("prefill")), queue([(2048, 0.9), (2048, 1.0)]))
    urged = clock_of(make_policy("mpc", context("prefill")), queue([(2048, 0.9), (2048, 0.58)]))
    assert urged > lazy


def test_a_deadline_met_by_the_clock_rounded_up_is_met():
    for slack in np.linspace(0.27, 0.34, 15):
        observation = queue([(2048, slack)])
        clock = float(clock_of(make_policy("mpc", context("prefill")), observation))
        deadline = (
            float(plant("prefill").spec.value(observation, "batch_slack"))
            * plant("prefill").slo.ttft_s
        )
        assert float(MODEL.latency_s(2048, 0.5 * 2048**2, 0.0, 1, clock)) <= deadline * (1 + 4e-4)


def test_margin_moves_every_deadline_by_a_share_of_the_slo():
    _, plain, _ = plans(queue([(2048, 0.5), (2048, 0.8)])[None])
    _, early, _ = plans(queue([(2048, 0.5), (2048, 0.8)])[None], margin=0.2)
    moved = plain["deadline_s"] - early["deadline_s"]
    np.testing.assert_allclose(moved[0, :2], 0.2 * plant("prefill").slo.ttft_s, rtol=1e-6)
    assert np.all(plain["deadline_s"][0, 2:] == FAR_S)


def test_giving_up_lost_requests_saves_what_cannot_help_them():
    observation = queue([(2048, -0.5)])
    assert clock_of(make_policy("mpc", context("prefill")), observation) == 1980.0
    assert clock_of(make_policy("mpc", context("prefill"), give_up=True), observation) < 1300.0


def test_idle_credit_makes_time_cheaper_not_dearer():
    o = queue([(1500, 0.99)])
    plain, credited = (
        clock_of(make_policy("mpc", context("prefill"), idle_credit=v), o) for v in (0.0, 1.0)
    )
    assert credited < plain


def test_the_clock_to_wait_at_is_lower_where_arrivals_are_rare_and_only_the_last_batch_pays():
    asked = [
        float(
            clock_of(
                make_policy("mpc", context("prefill"), idle_clock=1.0),
                queue([(1500, 0.99)], arrival_rate_60s=r),
            )
        )
        for r in (20.0, 1.0, 0.1)
    ]
    assert asked[0] > asked[1] > asked[2]
    _, stages, _ = plans(
        queue([(700, 0.9), (300, 0.99)], arrival_rate_60s=0.5)[None], idle_clock=0.5
    )
    np.testing.assert_allclose(stages["idle_s"][0], [0.0, 1.0] + [0.0] * 6, rtol=1e-5)
    _, rare, _ = plans(queue([(700, 0.9)])[None], idle_clock=1.0)
    assert rare["idle_s"][0, 0] == pytest.approx(60.0)


def test_forecast_fills_only_empty_stages_and_only_when_something_arrives():
    o = queue([(2048, 0.9), (700, 0.99)])
    _, plain, _ = plans(o[None])
    _, quiet, _ = plans(o[None], forecast=1.0)
    assert np.array_equal(plain, quiet)
    busy = queue([(2048, 0.9), (700, 0.99)], arrival_rate_10s=6.0, token_rate_10s=6000.0)
    problem, filled, _ = plans(busy[None], forecast=1.0)
    assert np.array_equal(filled[0, :2], plain[0, :2])
    added = filled[0, 2:]
    drain = problem.durations_s(plain, np.full((1, 8), problem.cheapest_ghz)).sum()
    assert added["tokens"][0] == pytest.approx(max(6000.0 * drain, 1000.0), rel=1e-3)
    assert added["share"][0] == 1.0
    assert added["weight"][0] == pytest.approx(1.0 - np.exp(-6.0 * drain), rel=1e-3)
    assert added["deadline_s"][0] == pytest.approx(plant("prefill").slo.ttft_s, rel=1e-5)
    assert added["share"][1:].sum() == 0.0


def test_delay_is_spent_at_the_clocks_already_asked_for():
    late = queue(
        [(2048, 0.9)],
        freq_current=1980.0,
        freq_pending=1980.0,
        time_to_apply=0.0,
        actuation_delay=0.05,
    )
    problem, stages, _ = plans(late[None], delay_aware=True)
    cap_s = float(MODEL.latency_s(2048, 0.5 * 2048**2, 0.0, 1, 1980.0))
    assert stages["lead_s"][0, 0] == pytest.approx(0.05)
    assert stages["share"][0, 0] == pytest.approx(1.0 - 0.05 / cap_s, rel=1e-6)
    flying = queue(
        [(2048, 0.9)],
        freq_current=900.0,
        freq_pending=1500.0,
        time_to_apply=0.02,
        actuation_delay=0.05,
    )
    problem, stages, _ = plans(flying[None], delay_aware=True)
    t900, t1500 = (float(MODEL.latency_s(2048, 0.5 * 2048**2, 0.0, 1, f)) for f in (900.0, 1500.0))
    assert stages["lead_s"][0, 0] == pytest.approx(0.07)
    assert stages["share"][0, 0] == pytest.approx(1.0 - 0.02 / t900 - 0.05 / t1500, rel=1e-6)
    assert isinstance(problem, MpcProblem)


def test_work_done_before_a_clock_can_act_leaves_the_decision_to_what_follows():
    o = queue([(40, 0.9), (2048, 0.4)], actuation_delay=0.1)
    _, stages, plan = plans(o[None], delay_aware=True)
    assert stages["share"][0, 0] == 0.0
    assert 0.0 < stages["share"][0, 1] < 1.0
    policy = make_policy("mpc", context("prefill"), delay_aware=True)
    asked = policy.problem.to_clock_mhz(stages, plan)[0]
    assert asked >= plan[0, 1] * 1e3 - 0.5


def test_the_predicted_batch_time_is_the_simulators():
    """With the delay known, the first stage at the chosen clock takes exactly as long as the batch
    then takes in the plant.
    """
    env = gym.make("BiScale/Prefill-v1", rate_rps=3.0, episode_s=40.0)
    w = env.unwrapped.plant
    policy = make_policy("mpc", context("prefill"), delay_aware=True)
    observation, _ = env.reset(seed=1)
    checked, truncated = 0, False
    while not truncated:
        action, _ = policy.predict(observation)
        freq_ghz = w.clocks.snap_mhz(w.clocks.to_freq_mhz(action)) * 1e-3
        stages = policy.problem.stages(observation[None] * SCALE)
        same = abs(freq_ghz[0] * 1e3 - w.spec.value(observation, "freq_pending")) < 1.0
        queued = (
            w.spec.value(observation, "time_to_apply")
            > w.spec.value(observation, "actuation_delay") + 1e-6
        )
        plan = np.minimum(np.full((1, 8), freq_ghz[0]), stages["cap_ghz"])
        predicted = policy.problem.durations_s(stages, plan)[0, 0]
        first = stages["share"][0, 0]
        observation, _, _, truncated, _ = env.step(action)
        if not (same or queued) and 0.0 < first < 1.0:
            checked += 1
            assert w.spec.value(observation, "last_time") == pytest.approx(predicted, rel=2e-4)
    assert checked > 10


def test_counts_and_no_failures():
    policy = FastMpcController(context("prefill"))
    policy.predict(recorded("prefill", 50))
    assert policy.stats()["decisions"] == 50
    assert policy.stats()["solver_failures"] == 0
    assert policy.stats()["iterations"] > 0
    assert MpcOptions() == policy.problem.options


def test_a_parked_instance_has_no_clock_to_wait_at():
    """The clock that one waits at costs nothing, and a second of waiting the parked power."""
    o = queue([(2048, 0.9)], arrival_rate_60s=0.2)
    power_w = 85.0

    def clock(idle, **options):
        settings = {"parked_power_w": power_w} if idle == "parked" else {}
        return clock_of(make_policy("mpc", context("prefill", idle=idle, **settings), **options), o)

    assert clock("last-clock", idle_clock=1.0) < clock("last-clock")
    assert clock("parked", idle_clock=1.0) == clock("parked") == clock("last-clock")
    problem = MpcProblem(
        context("prefill", idle="parked", parked_power_w=power_w), MpcOptions(idle_credit=0.5)
    )
    assert problem.credit_w == 0.5 * 4 * power_w
