"""The reference prefill MPC: the problem of `mpc_problem` in do-mpc, solved by IPOPT.

Law (arXiv 2602.18755, continuous clocks ``f_k``, soft deadlines)::

    minimise   sum_k energy(f_k) + LATE_W sum_k max(0, t_{k+1} - deadline_k)
    within     t_{k+1} = t_k + duration(f_k),   f_min <= f_k <= cap_k

and apply ``f_1``; :mod:`controllers.prefill.mpc_problem` has every term.
"""

import contextlib
import importlib.util
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from time import perf_counter
from typing import Any, ClassVar

import casadi as ca
import numpy as np

from biscale_env.contract.observation import HORIZON
from biscale_env.models.physics import idle_power_w, iteration_energy_j, latency_s
from controllers.base import Floats
from controllers.prefill.mpc_controller import MpcController
from controllers.prefill.mpc_problem import LATE_W, MpcProblem
from controllers.records import Records


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Let the import of do-mpc in this thread find no torch, unless that is loaded already.

    It loads torch whenever it is installed, for networks that are not used here: 230 MB in every
    worker process, enough for joblib to take the growth for a leak and replace the worker. Other
    threads find what there is, and the function is put back whatever happens.
    """
    find_spec, importing = importlib.util.find_spec, threading.get_ident()

    def found(name: str, package: str | None = None) -> ModuleSpec | None:
        here = threading.get_ident() == importing
        if here and name == "torch" and name not in sys.modules:
            return None
        return find_spec(name, package)

    importlib.util.find_spec = found
    try:
        yield
    finally:
        if importlib.util.find_spec is found:
            importlib.util.find_spec = find_spec


with (
    warnings.catch_warnings(),
    _without_torch(),
):  # do-mpc announces the optional features that are not installed
    warnings.simplefilter("ignore", UserWarning)
    import do_mpc


class _NumpyMode:
    """CasADi's way of NumPy calls on its values, as do-mpc counts on it, while it is at work.

    CasADi >= 3.8 has a process-wide option for it. It is set by the first that enters and put back
    by the last that leaves, so that the caller's own CasADi code finds what it had set.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, 0
        self._known = hasattr(ca.GlobalOptions, "setNumpyMode")

    def __enter__(self) -> None:
        with self._lock:
            if self._known and self._inside == 0:
                self._before = ca.GlobalOptions.getNumpyMode()
                ca.GlobalOptions.setNumpyMode(-1)
            self._inside += 1

    def __exit__(self, *unused: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._known and self._inside == 0:
                ca.GlobalOptions.setNumpyMode(self._before)


NUMPY_MODE = _NumpyMode()
log = logging.getLogger(__name__)
KILO = 1e3  # the objective is in kJ, which keeps it near 1
STAGE_PARAMETERS = (
    "tokens",
    "attn_work",
    "n_seq",
    "deadline_s",
    "lead_s",
    "share",
    "weight",
    "idle_s",
    "cap_ghz",
)
# curvature of an empty stage's input around its rest point: it costs nothing there and keeps the
# Hessian regular
IDLE_WEIGHT = 1e-2
SCALES = {"tokens": 1e3, "attn_work": 1e6}  # parameters are passed in these units
IPOPT = {
    "ipopt.print_level": 0,
    "ipopt.sb": "yes",
    "print_time": 0,
    "ipopt.linear_solver": "mumps",
    "ipopt.max_iter": 100,
    "ipopt.tol": 1e-7,
    "ipopt.mu_strategy": "monotone",  # adaptive cycles on a few overloaded states in some members
}


def symbolic_stage(problem: MpcProblem, model: Any) -> tuple[Any, Any, Any]:
    """Declare one stage on a do-mpc model.

    Returns the CasADi expressions (completion time, energy in J, time).
    """
    c = problem.coefficients
    t = model.set_variable("_x", "time_s")
    u = model.set_variable("_u", "rise")
    p = {
        name: model.set_variable("_tvp", name) * SCALES.get(name, 1.0) for name in STAGE_PARAMETERS
    }
    f = problem.freq_min_ghz + u * (p["cap_ghz"] - problem.freq_min_ghz)
    duration = latency_s(c, p["tokens"], p["attn_work"], 0.0, p["n_seq"], f)
    energy = c.n_gpus * iteration_energy_j(
        c, p["tokens"], p["attn_work"], 0.0, p["n_seq"], duration, f
    )
    done = t + p["lead_s"] + p["share"] * duration
    idle = ca.if_else(p["share"] > 0.0, 0.0, 1.0)
    wait = (1.0 - idle) * p["idle_s"] * c.n_gpus * idle_power_w(c, f)
    model.set_rhs("time_s", done)
    model.set_expression("late_by", done - p["deadline_s"])
    model.set_expression(
        "stage_cost",
        (p["weight"] * p["share"] * energy + wait) / KILO + idle * IDLE_WEIGHT * (u - 0.5) ** 2,
    )
    return done, energy, duration


def build(problem: MpcProblem) -> Any:
    """The do-mpc controller of a problem; the symbolic work is done here, once."""
    model = do_mpc.model.Model("discrete", "SX")
    symbolic_stage(problem, model)
    model.setup()
    mpc = do_mpc.controller.MPC(model)
    mpc.settings.n_horizon = HORIZON
    mpc.settings.t_step = 1.0
    mpc.settings.store_full_solution = False
    mpc.settings.nlpsol_opts = dict(IPOPT)
    mpc.set_objective(
        mterm=-problem.credit_w / KILO * model.x["time_s"], lterm=model.aux["stage_cost"]
    )
    mpc.set_rterm(rise=0.0)
    mpc.bounds["lower", "_u", "rise"] = 0.0
    mpc.bounds["upper", "_u", "rise"] = 1.0
    mpc.set_nl_cons(
        "ttft", model.aux["late_by"], ub=0.0, soft_constraint=True, penalty_term_cons=LATE_W / KILO
    )
    template = mpc.get_tvp_template()
    mpc.set_tvp_fun(lambda t_now: template)
    mpc.setup()
    return mpc


@dataclass(frozen=True)
class Solution:
    """What a solver returns for one decision.

    Attributes:
        plan_ghz: clocks of the stages, (HORIZON,), GHz.
        ok: whether the solver says it is optimal.
        status: the solver's own words.
        objective_j: objective, J.
        iterations: solver iterations.
        time_s: wall time of the solve.
    """

    plan_ghz: Floats
    ok: bool
    status: str
    objective_j: float
    iterations: int
    time_s: float


class DoMpcSolver:
    """Sets parameters and starting point of the built problem and reads the answer.

    Keeps nothing between calls.
    """

    def __init__(self, problem: MpcProblem) -> None:
        """Build the problem."""
        self.problem = problem
        with NUMPY_MODE:
            self.mpc = build(problem)
        self._parameters = np.zeros(self.mpc.opt_p_num.size)
        self._guess = np.zeros(self.mpc.opt_x_num.size)

    def __reduce__(self) -> tuple[type["DoMpcSolver"], tuple[MpcProblem]]:
        """Pickled and copied as the problem, which is built again: CasADi objects cannot be."""
        return DoMpcSolver, (self.problem,)

    def _set_parameters(self, stages: Records) -> None:
        """Layout of do-mpc: x0, the parameters stage by stage, then the last input.

        There is one stage more than the horizon.
        """
        table = self._parameters[1:-1].reshape(HORIZON + 1, len(STAGE_PARAMETERS))
        for j, name in enumerate(STAGE_PARAMETERS):
            table[:HORIZON, j] = stages[name] / SCALES.get(name, 1.0)
        table[HORIZON, -1] = self.problem.freq_max_ghz
        self.mpc.opt_p_num.master = ca.DM(self._parameters)

    def _set_guess(self, stages: Records, plan_ghz: Floats) -> None:
        """Layout of do-mpc: times, inputs, lateness. The times are those of the guessed clocks."""
        low = self.problem.freq_min_ghz
        done = np.cumsum(self.problem.durations_s(stages, plan_ghz))
        self._guess[1 : HORIZON + 1] = done
        self._guess[HORIZON + 1 : 2 * HORIZON + 1] = np.clip(
            (plan_ghz - low) / np.maximum(stages["cap_ghz"] - low, 1e-9), 0.01, 0.99
        )
        self._guess[2 * HORIZON + 1 :] = np.maximum(done - stages["deadline_s"], 0.0)
        self.mpc.opt_x_num.master = ca.DM(self._guess)

    def solve(self, stages: Records, guess_ghz: Floats) -> Solution:
        """Solve one decision.

        Args:
            stages: (HORIZON,) records of `STAGE_DTYPE`.
            guess_ghz: clocks to start from, (HORIZON,), GHz.
        """
        began = perf_counter()
        with NUMPY_MODE:
            self._set_parameters(stages)
            self._set_guess(stages, guess_ghz)
            self.mpc.solve()
            stats = self.mpc.solver_stats
            rise = self.mpc.opt_x_num.master.full().ravel()[HORIZON + 1 : 2 * HORIZON + 1]
        low = self.problem.freq_min_ghz
        plan = low + np.clip(rise, 0.0, 1.0) * (stages["cap_ghz"] - low)
        return Solution(
            plan_ghz=plan,
            ok=bool(stats["success"]),
            status=str(stats["return_status"]),
            objective_j=float(self.problem.objective_j(stages, plan)),
            iterations=int(stats["iter_count"]),
            time_s=perf_counter() - began,
        )


class DoMpcController(MpcController):
    """BiScale's prefill controller (arXiv 2602.18755) as a model predictive controller in do-mpc.

    At every batch boundary it projects the next K = 8 batches, predicts when each completes, plans
    the clocks of least energy that meet every TTFT deadline, and applies the first. Changed to fit:
    the paper searches greedily over 7 clocks (that is ``mpc-greedy``); here the clocks are
    continuous, the deadlines soft with an exact penalty, and the extras of :class:`MpcOptions` can
    be switched on.

    Every solve starts from the energy-optimal clock: measured, that takes fewer iterations than the
    shifted last plan, whose clocks lie on bounds. A failed solve falls back to the last plan,
    shifted by one batch, and without one to the highest clock; both are counted.
    """

    memory_size = HORIZON
    COUNTED: ClassVar[tuple[str, ...]] = (
        "decisions",
        "solver_failures",
        "fallback_shifted",
        "fallback_max",
        "iterations",
    )

    def prepare(self) -> None:
        """Build the symbolic problem, once."""
        self.solver = DoMpcSolver(self.problem)
        self._time_s = 0.0

    def first_memory(self) -> Floats:
        """No plan yet."""
        return np.full(HORIZON, np.nan)

    def stats(self) -> dict[str, float]:
        """Decisions, failures, fallbacks, solver iterations and wall time in s."""
        return {**super().stats(), "solver_time_s": self._time_s}

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """Solve every row."""
        assert memory is not None
        stages = self.problem.stages(x)
        plans = np.empty((len(x), HORIZON))
        for i in range(len(x)):
            plans[i] = self._plan(stages[i], memory[i])
        return self.problem.to_clock_mhz(stages, plans), np.concatenate(
            [plans[:, 1:], plans[:, -1:]], axis=1
        )

    def _plan(self, stages: Records, last: Floats) -> Floats:
        """Plan of one row; ``last`` is the last plan already shifted, NaN where there is none."""
        top = np.full(HORIZON, self.problem.freq_max_ghz)
        if not (stages["share"] > 0.0).any():
            return np.full(HORIZON, self.problem.cheapest_ghz)
        known = np.isfinite(last).all()
        solution = self.solver.solve(stages, np.full(HORIZON, self.problem.cheapest_ghz))
        self._counts["decisions"] += 1
        self._counts["iterations"] += solution.iterations
        self._time_s += solution.time_s
        if solution.ok:
            return solution.plan_ghz
        log.warning("MPC: %s after %d iterations", solution.status, solution.iterations)
        self._counts["solver_failures"] += 1
        self._counts["fallback_shifted" if known else "fallback_max"] += 1
        return np.minimum(last, stages["cap_ghz"]) if known else top
