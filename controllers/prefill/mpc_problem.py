"""The prefill MPC problem, once: its stages, read out of the observation, for every solver.

A stage is a projected batch. Its clock ``f_k`` is the input, the time at which it completes is the
state (arXiv 2602.18755, with continuous clocks and the extras of :class:`MpcOptions`)::

    t_0 = 0,   t_{k+1} = t_k + lead_k + share_k L(work_k, f_k)
    minimise   sum_k weight_k share_k E(work_k, f_k) + sum_k idle_k P_idle(f_k)
               - idle_credit P_idle(f*) t_K + LATE_W sum_k max(0, t_{k+1} - deadline_k)
    within     f_min <= f_k <= cap_k

with latency L and energy E (all GPUs) of `models.physics`. ``deadline_k`` is the tightest TTFT
deadline among the requests that complete in batch k. ``cap_k`` is the clock above which the power
cap makes a higher request useless. ``lead_k`` is time, ``1 - share_k`` work, that a clock asked for
now can no longer change. An empty stage has share 0: it costs nothing and takes no time. A forecast
batch takes its time for certain, so that there is room for it, but costs its energy only with the
probability ``weight_k`` that it comes. ``idle_k`` is zero but for the last batch of the queue,
whose clock the instance keeps while it waits: the mean time between arrivals.

The penalty is exact: ``LATE_W`` lies above the highest marginal price of time (J saved per second)
at any clock, work and ensemble member, so a deadline is missed only where even the highest clock
cannot meet it.
"""

from dataclasses import asdict

import numpy as np

from biscale_env.contract.observation import HORIZON
from biscale_env.core.errors import BiscaleError
from biscale_env.core.jit import compiled, inlined
from biscale_env.models import COEFFICIENT_DTYPE, IterationModel
from biscale_env.models.physics import (
    Coefficients,
    effective_freq_ghz,
    idle_power_w,
    iteration_energy_j,
    latency_s,
)
from controllers.base import Floats, PolicyContext
from controllers.columns import PREFILL
from controllers.prefill.mpc_options import FAR_S, NO_DEADLINE, RARE_RPS, MpcOptions
from controllers.records import Records, record_dtype

# J per second of lateness; the highest price seen over all members and 1 to 2048 tokens is 4.3e4 W
# (tested)
LATE_W = 2e5
ROUNDING_MHZ = 0.5  # a planned clock this little above a grid clock is that clock (tolerance)
# work whose energy-optimal clock stands for the clock of idling and of drain estimates: the mean
# Azure prompt
REFERENCE_TOKENS = 1024.0


class Stage:
    """One stage as a record of :data:`STAGE_DTYPE`.

    Attributes:
        tokens: new tokens of the batch.
        attn_work: its attention token-pairs.
        n_seq: its requests.
        deadline_s: tightest deadline, from now; FAR_S: none.
        lead_s: time spent on the batch before the chosen clock takes effect.
        share: fraction of the work done at the chosen clock; 0: nothing to choose.
        weight: probability that the batch comes to be, which weighs its energy; 1 for what waits.
        cap_ghz: highest clock that the power cap allows.
        idle_s: time for which the instance is expected to wait at the clock of this batch.
    """

    tokens: float
    attn_work: float
    n_seq: float
    deadline_s: float
    lead_s: float
    share: float
    weight: float
    cap_ghz: float
    idle_s: float


class ProblemSetting:
    """Options and constants of a problem as a record of :data:`SETTING_DTYPE`.

    Attributes:
        margin: see :class:`MpcOptions`, as the other options.
        token_budget: new tokens per batch.
        drain_ghz: energy-optimal clock, at which the queue is taken to drain.
        freq_min_ghz: lowest clock.
        freq_max_ghz: highest clock.
    """

    margin: float
    give_up: float
    forecast: float
    delay_aware: float
    idle_credit: float
    idle_clock: float
    token_budget: float
    drain_ghz: float
    freq_min_ghz: float
    freq_max_ghz: float


STAGE_DTYPE = record_dtype(Stage)
SETTING_DTYPE = record_dtype(ProblemSetting)


@inlined
def stage_latency_s(c: Coefficients, st: Stage, freq_ghz: float) -> float:
    """Duration of the whole batch of a stage at a clock, s."""
    return latency_s(c, st.tokens, st.attn_work, 0.0, st.n_seq, freq_ghz)


@inlined
def cap_of(c: Coefficients, st: Stage, setting: ProblemSetting) -> float:
    """Highest useful clock of a batch, GHz."""
    low, high = setting.freq_min_ghz, setting.freq_max_ghz
    return effective_freq_ghz(c, st.tokens, st.attn_work, 0.0, st.n_seq, high, low)


@inlined
def read_queue(c: Coefficients, x: Floats, setting: ProblemSetting, stages: Records) -> int:
    """Fill the stages with the projected batches of the queue; returns their number."""
    slo = x[PREFILL.slo]
    used = 0
    for k in range(stages.size):
        st = stages[k]
        st.tokens = x[PREFILL.batch_tokens + k]
        st.attn_work = x[PREFILL.batch_attn + k]
        st.n_seq = x[PREFILL.batch_requests + k]
        st.lead_s = 0.0
        st.share = 1.0 if st.tokens > 0.0 else 0.0
        st.weight = 1.0
        alive, tightest = x[PREFILL.batch_slack_alive + k], x[PREFILL.batch_slack + k]
        slack = alive if setting.give_up > 0.0 else tightest
        due = slack < NO_DEADLINE and st.tokens > 0.0
        st.deadline_s = (slack - setting.margin) * slo if due else FAR_S
        st.cap_ghz = cap_of(c, st, setting)
        st.idle_s = 0.0
        if st.tokens > 0.0:
            used = k + 1
    if used > 0:
        rate_rps = max(x[PREFILL.arrival_rate_60s], RARE_RPS)
        stages[used - 1].idle_s = setting.idle_clock / rate_rps
    return used


@inlined
def add_forecast(
    c: Coefficients, x: Floats, setting: ProblemSetting, used: int, stages: Records
) -> None:
    """Fill empty stages with the requests expected while the queue drains.

    It drains at the energy-optimal clock. They arrive evenly, the first at once; a batch costs with
    the probability that a Poisson stream brings it any request.
    """
    tokens_per_s = setting.forecast * x[PREFILL.token_rate_10s]
    per_s = setting.forecast * x[PREFILL.arrival_rate_10s]
    if used == 0 or tokens_per_s <= 0.0 or per_s <= 0.0:
        return
    mean = tokens_per_s / per_s
    drain = 0.0
    for k in range(used):
        st = stages[k]
        drain += stage_latency_s(c, st, min(setting.drain_ghz, st.cap_ghz))
    left = tokens_per_s * drain
    arrived = 0.0
    for k in range(used, stages.size):
        if left <= 0.0:
            break
        st = stages[k]
        expected = min(left, setting.token_budget)
        st.share = 1.0
        st.weight = 1.0 - np.exp(-expected / mean)
        st.tokens = min(max(expected, mean), setting.token_budget)
        st.n_seq = max(expected / mean, 1.0)
        st.attn_work = 0.5 * st.tokens * mean
        st.deadline_s = arrived / tokens_per_s + (1.0 - setting.margin) * x[PREFILL.slo]
        st.cap_ghz = cap_of(c, st, setting)
        arrived += expected
        left -= expected


@inlined
def spend_delay(c: Coefficients, x: Floats, stages: Records) -> None:
    """Give the time before a new clock takes effect to the clocks requested before.

    A request waits for the one in flight (then takes a full delay), or takes the place of one that
    still waits behind it.
    """
    wait, delay = x[PREFILL.time_to_apply], x[PREFILL.actuation_delay]
    queued = wait > delay + 1e-6
    takes_effect = wait if queued else wait + delay
    switch = takes_effect if queued else wait
    now = 0.0
    for k in range(stages.size):
        st = stages[k]
        while st.share > 1e-9 and now < takes_effect - 1e-9:
            applied = x[PREFILL.freq_current] if now < switch else x[PREFILL.freq_pending]
            until = switch if now < switch else takes_effect
            duration = stage_latency_s(c, st, min(applied * 1e-3, st.cap_ghz))
            step = min(st.share * duration, until - now)
            st.lead_s += step
            st.share = max(st.share - step / duration, 0.0)
            now = until if step == until - now else now + step
        if now >= takes_effect - 1e-9:
            return
    # everything is done before a new clock takes effect: decide as if there were no delay
    for k in range(stages.size):
        st = stages[k]
        if st.tokens > 0.0:
            st.share = 1.0
            st.lead_s = 0.0


@compiled
def read_stages(coef: Records, x: Floats, settings: Records, out: Records) -> None:
    """Stages (n, HORIZON) of the physical observations x (n, dim)."""
    setting = settings[0]
    for i in range(x.shape[0]):
        used = read_queue(coef[0], x[i], setting, out[i])
        if setting.forecast > 0.0:
            add_forecast(coef[0], x[i], setting, used, out[i])
        if setting.delay_aware > 0.0:
            spend_delay(coef[0], x[i], out[i])


class MpcProblem:
    """The problem for one context: its coefficients, its clock range and its stages."""

    def __init__(self, context: PolicyContext, options: MpcOptions) -> None:
        """Resolve columns and constants.

        Args:
            context: gives the model, its member and the clock range.
            options: what is switched on.

        Raises:
            BiscaleError: the model is not the smooth formula (an `IterationModel`).
        """
        if not isinstance(context.model, IterationModel):
            raise BiscaleError(
                "the MPC needs a smooth model (IterationModel): use mpc-greedy with other "
                "predictors"
            )
        self.context, self.options = context, options
        self.coefficients = context.model.member(context.member)
        self.coef = np.array([tuple(self.coefficients)], dtype=COEFFICIENT_DTYPE)
        self.freq_min_ghz = context.clocks.freq_min_mhz * 1e-3
        self.freq_max_ghz = context.clocks.freq_max_mhz * 1e-3
        work = (REFERENCE_TOKENS, REFERENCE_TOKENS**2 / 2, 0.0, 1.0)
        self.cheapest_ghz = (
            float(context.model.optimal_freq_mhz(*work, member=context.member)) * 1e-3
        )
        parked_w = context.parked_power_w
        self.parked = parked_w is not None
        waiting_w = (
            idle_power_w(self.coefficients, self.cheapest_ghz) if parked_w is None else parked_w
        )
        self.credit_w = options.idle_credit * self.coefficients.n_gpus * float(waiting_w)
        constants = (
            float(context.token_budget),
            self.cheapest_ghz,
            self.freq_min_ghz,
            self.freq_max_ghz,
        )
        chosen = tuple(float(v) for v in asdict(options).values())
        self._settings = np.array([(*chosen, *constants)], dtype=SETTING_DTYPE)

    def stages(self, x: Floats) -> Records:
        """Stages (n, HORIZON) of physical observations (n, dim)."""
        out = np.zeros((len(x), HORIZON), dtype=STAGE_DTYPE)
        read_stages(self.coef, x, self._settings, out)
        if self.parked:  # no clock changes what the wait behind the queue costs
            out["idle_s"] = 0.0
        return out

    def durations_s(self, stages: Records, freq_ghz: Floats) -> Floats:
        """Time that each stage adds at planned clocks, s; both arguments (..., HORIZON)."""
        latency = latency_s(
            self.coefficients, stages["tokens"], stages["attn_work"], 0.0, stages["n_seq"], freq_ghz
        )
        return np.asarray(stages["lead_s"] + stages["share"] * latency)

    def objective_j(self, stages: Records, freq_ghz: Floats) -> Floats:
        """Objective of a plan, J; both arguments (..., HORIZON), result (...)."""
        c = self.coefficients
        latency = latency_s(
            c, stages["tokens"], stages["attn_work"], 0.0, stages["n_seq"], freq_ghz
        )
        energy = c.n_gpus * iteration_energy_j(
            c, stages["tokens"], stages["attn_work"], 0.0, stages["n_seq"], latency, freq_ghz
        )
        done = np.cumsum(stages["lead_s"] + stages["share"] * latency, axis=-1)
        late = np.maximum(done - stages["deadline_s"], 0.0).sum(axis=-1)
        idle = np.where(
            stages["share"] > 0.0, stages["idle_s"] * c.n_gpus * idle_power_w(c, freq_ghz), 0.0
        )
        return np.asarray(
            (stages["weight"] * stages["share"] * energy + idle).sum(axis=-1)
            - self.credit_w * done[..., -1]
            + LATE_W * late
        )

    def to_clock_mhz(self, stages: Records, freq_ghz: Floats) -> Floats:
        """Clock to request, (n,), MHz, from planned clocks (n, HORIZON), GHz.

        It is that of the first stage that a request can still change, rounded up to the grid (so
        that a deadline that was just met stays met), and the highest clock where the plan runs into
        the power cap: there the batch should go as fast as it can.
        """
        rows = np.arange(len(stages))
        first = (stages["share"] > 0.0).argmax(axis=1)
        asked = freq_ghz[rows, first]
        clocks = self.context.clocks
        return np.where(
            asked > stages["cap_ghz"][rows, first] - ROUNDING_MHZ * 1e-3,
            clocks.freq_max_mhz,
            clocks.snap_up_mhz(asked * 1e3, ROUNDING_MHZ),
        )
