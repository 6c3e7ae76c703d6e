"""The do-mpc reference: closed forms, empty stages, failures.

And the price method against it on recorded states.
"""

import importlib.util
import subprocess
import sys

import casadi as ca
import numpy as np
import pytest
from controllers_cases import clock_of, context, encode, plant, queue, recorded
from scipy.optimize import brentq, minimize_scalar

from biscale_env.models import physics
from controllers import make_policy
from controllers.prefill import mpc_dompc
from controllers.prefill.mpc_dompc import DoMpcController, DoMpcSolver
from controllers.prefill.mpc_dual import FastMpcController
from controllers.prefill.mpc_options import MpcOptions
from controllers.prefill.mpc_problem import LATE_W, MpcProblem

MODEL = plant("prefill").model
SLO_S = plant("prefill").slo.ttft_s
EXTRAS = {
    "plain": {},
    "margin": {"margin": 0.15},
    "give_up": {"give_up": True},
    "delay": {"delay_aware": True},
    "forecast": {"forecast": 1.0},
    "idle": {"idle_credit": 1.0},
    "wait": {"idle_clock": 1.0},
    "all": {
        "margin": 0.1,
        "give_up": True,
        "delay_aware": True,
        "forecast": 1.0,
        "idle_credit": 1.0,
        "idle_clock": 0.5,
    },
}


@pytest.fixture(scope="module")
def reference():
    return make_policy("mpc-dompc", context("prefill"))


def work(tokens):
    return tokens, 0.5 * tokens**2, 0.0, 1.0


def scalar_optimum_mhz(tokens, deadline_s):
    """One batch by scipy: least energy among the clocks that meet the deadline, under the cap."""
    cap = float(MODEL.effective_freq_mhz(*work(tokens), 1980.0))
    search = {"bounds": (510.0, cap), "method": "bounded", "options": {"xatol": 1e-4}}
    best = minimize_scalar(lambda f: float(MODEL.energy_j(*work(tokens), f)), **search).x
    if float(MODEL.latency_s(*work(tokens), best)) <= deadline_s:
        return best
    return brentq(lambda f: float(MODEL.latency_s(*work(tokens), f)) - deadline_s, best, cap)


@pytest.mark.parametrize("tokens", [200, 1000, 2048])
@pytest.mark.parametrize("tightness", [0.1, 0.4, 0.7, 0.95])
def test_one_batch_is_a_scalar_minimisation(reference, tokens, tightness):
    fastest = float(MODEL.latency_s(*work(tokens), 1980.0))
    slowest = float(MODEL.latency_s(*work(tokens), 900.0))
    slack = (slowest + tightness * (fastest - slowest)) / SLO_S
    observation = queue([(tokens, slack)])
    stages = reference.problem.stages(observation[None] * reference.context.spec.scale)
    expected = scalar_optimum_mhz(tokens, float(stages["deadline_s"][0, 0]))
    solution = reference.solver.solve(stages[0], np.full(8, 1.1))
    assert solution.ok
    assert solution.plan_ghz[0] * 1e3 == pytest.approx(expected, abs=0.5)
    assert -0.5 <= clock_of(reference, observation) - expected <= 15.0 + 0.5


def test_without_a_near_deadline_it_is_the_energy_optimal_clock(reference):
    best = float(MODEL.optimal_freq_mhz(*work(1500)))
    assert abs(clock_of(reference, queue([(1500, 10.0)])) - best) <= 15.0
    assert abs(clock_of(reference, queue([(1500, 0.999)])) - best) <= 15.0


@pytest.mark.parametrize("slack", [-0.5, 0.0, 0.05])
def test_an_impossible_deadline_takes_the_highest_clock(reference, slack):
    assert clock_of(reference, queue([(2048, slack)])) == 1980.0
    assert clock_of(reference, queue([(2048, 0.9), (2048, slack)])) == 1980.0


def test_empty_stages_cost_nothing_and_do_not_disturb(reference):
    one = reference.problem.stages(queue([(1500, 0.25)])[None] * reference.context.spec.scale)[0]
    solution = reference.solver.solve(one, np.full(8, 1.1))
    f = solution.plan_ghz[0]
    assert reference.problem.durations_s(one, solution.plan_ghz)[1:].sum() == 0.0
    assert solution.objective_j == pytest.approx(
        float(MODEL.energy_j(*work(1500), f * 1e3)), rel=1e-6
    )
    reported = float(reference.solver.mpc.S.stats()["iterations"]["obj"][-1]) * 1e3
    assert reported == pytest.approx(solution.objective_j, rel=1e-4)


def test_an_empty_queue_is_answered_without_a_solve(reference):
    before = reference.stats()["decisions"]
    assert clock_of(reference, encode("prefill")) == pytest.approx(
        reference.problem.cheapest_ghz * 1e3
    )
    assert reference.stats()["decisions"] == before


def test_a_failed_solve_falls_back_to_the_shifted_plan_then_to_the_highest_clock(
    monkeypatch, caplog
):
    working = DoMpcController(context("prefill"))
    observation = queue([(2048, 0.4), (2048, 0.75), (2048, 0.9), (1000, 0.98)])
    _, memory = working.predict(observation)
    monkeypatch.setitem(mpc_dompc.IPOPT, "ipopt.max_iter", 0)
    failing = DoMpcController(context("prefill"))
    shifted, after = failing.predict(observation, memory)
    planned = failing.problem.stages(observation[None] * failing.context.spec.scale)
    assert failing.stats()["solver_failures"] == failing.stats()["fallback_shifted"] == 1
    assert failing.context.clocks.to_freq_mhz(shifted) == pytest.approx(
        failing.problem.to_clock_mhz(planned, memory), abs=0.1
    )
    np.testing.assert_allclose(after[0, :-1], np.minimum(memory[0], planned["cap_ghz"][0])[1:])
    highest, _ = failing.predict(observation)
    assert highest == pytest.approx(1.0)
    assert failing.stats()["fallback_max"] == 1
    assert failing.stats()["solver_failures"] == failing.stats()["decisions"] == 2
    assert "Maximum_Iterations_Exceeded" in caplog.text
    assert working.stats()["solver_failures"] == 0


def compare(rows, options, member=-1):
    """Share of equal clocks or clocks of equal objective (flat optima), greatest difference in MHz,
    greatest relative excess of the fast objective; the reference must not fail.
    """
    c = context("prefill", member)
    slow, fast = DoMpcController(c, **options), FastMpcController(c, **options)
    clocks, costs = [], []
    for observation in rows:
        clocks.append((clock_of(slow, observation), clock_of(fast, observation)))
        stages = slow.problem.stages(observation[None] * c.spec.scale)
        theirs = slow.solver.solve(stages[0], np.full(8, slow.problem.cheapest_ghz))
        costs.append(
            (
                theirs.objective_j,
                float(slow.problem.objective_j(stages[0], fast.plan_ghz(stages)[0])),
            )
        )
    assert slow.stats()["solver_failures"] == 0
    a, b = np.array(clocks).T
    j = np.array(costs)
    return (
        float(np.mean((a == b) | (np.abs(j[:, 1] - j[:, 0]) <= 1e-6 * np.abs(j[:, 0])))),
        float(np.max(np.abs(a - b))),
        float(np.max((j[:, 1] - j[:, 0]) / np.abs(j[:, 0]))),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "all"])
def test_fast_agrees_with_the_reference(name):
    rows = recorded("prefill", 60, rate_rps=4.0, seed=5)
    equal, worst_mhz, excess = compare(rows, EXTRAS[name])
    assert equal >= 0.98
    assert worst_mhz <= 15.0
    assert excess <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("rate_rps", [1.5, 4.0, 8.0])
@pytest.mark.parametrize("name", list(EXTRAS))
def test_fast_agrees_with_the_reference_on_thousands_of_states(name, rate_rps):
    rows = recorded("prefill", 300, rate_rps=rate_rps, seed=11)
    for member, part in zip((-1, 5, 17, 33), np.array_split(rows, 4), strict=True):
        equal, worst_mhz, excess = compare(part, EXTRAS[name], member)
        print(
            f"{name} {rate_rps} member {member}: equal {equal:.4f}, worst {worst_mhz:g} MHz, "
            f"excess {excess:.1e}"
        )
        assert equal >= 0.97
        assert worst_mhz <= 15.0
        assert excess <= 1e-5


def test_the_symbolic_stage_is_the_numeric_one():
    problem = MpcProblem(context("prefill"), MpcOptions())
    model = mpc_dompc.do_mpc.model.Model("discrete", "SX")
    outputs = ca.vertcat(*mpc_dompc.symbolic_stage(problem, model))
    symbols = ca.symvar(outputs)
    f = ca.Function("stage", symbols, [outputs])
    rng = np.random.default_rng(2)
    for _ in range(20):
        v = {
            "tokens": rng.uniform(1, 2048),
            "attn_work": rng.uniform(1, 4e6),
            "n_seq": rng.uniform(1, 30),
            "time_s": rng.uniform(0, 2),
        }
        v |= {
            "lead_s": rng.uniform(0, 0.1),
            "share": rng.uniform(),
            "cap_ghz": rng.uniform(1.2, 1.98),
            "rise": rng.uniform(),
        }
        got = f(*[v[str(s)] / mpc_dompc.SCALES.get(str(s), 1.0) for s in symbols]).full().ravel()
        freq_ghz = 0.51 + v["rise"] * (v["cap_ghz"] - 0.51)
        c = MODEL.coefficients
        latency = physics.latency_s(c, v["tokens"], v["attn_work"], 0.0, v["n_seq"], freq_ghz)
        joules = c.n_gpus * physics.iteration_energy_j(
            c, v["tokens"], v["attn_work"], 0.0, v["n_seq"], latency, freq_ghz
        )
        np.testing.assert_allclose(
            got, [v["time_s"] + v["lead_s"] + v["share"] * latency, joules, latency], rtol=1e-9
        )


def test_solution_reports_iterations_time_and_status():
    solver = DoMpcSolver(MpcProblem(context("prefill"), MpcOptions()))
    stages = solver.problem.stages(
        queue([(2048, 0.4), (2048, 0.6)])[None] * context("prefill").spec.scale
    )[0]
    solution = solver.solve(stages, np.full(8, 1.2))
    assert solution.status == "Solve_Succeeded"
    assert 1 <= solution.iterations <= 50
    assert 0.0 < solution.time_s < 5.0
    assert LATE_W > 0


@pytest.mark.slow
def test_do_mpc_does_not_load_torch():
    """Torch takes 230 MB per worker, and nothing here needs it.

    Whoever wants it can still load it afterwards.
    """
    code = "import importlib.util, sys; import controllers.prefill.mpc_dompc\n"
    code += "print('torch' in sys.modules, importlib.util.find_spec('torch'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, found = done.stdout.split(maxsplit=1)
    assert loaded == "False"
    assert ("ModuleSpec" in found) == (importlib.util.find_spec("torch") is not None)
