"""One step of policy improvement on sampled futures: causal, exact where that is known."""

import numpy as np
import pytest

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.models.physics import idle_power_w
from biscale_env.traces import Trace
from controllers.oracle.improvement import Improver, run_improved
from controllers.oracle.sampled_futures import SampledFutures, decayed_rates

ROW = np.zeros(1, dtype=np.int64)


def plant(**changes):
    return Plant(PlantSettings.of("prefill", drain=True, actuation_delay_s=0.0, **changes))


def trace(arrival_s, prompt=800, duration_s=None, name="made"):
    n = len(arrival_s)
    prompts = np.broadcast_to(np.asarray(prompt), n).astype(np.int64)
    return Trace(
        name, np.asarray(arrival_s, float), prompts, np.full(n, 20), "made",
        duration_s or float(arrival_s[-1]) + 10.0,
    )  # fmt: skip


def poisson(rate_rps, duration_s, seed, prompt=800):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1.0 / rate_rps, int(2 * rate_rps * duration_s) + 20))
    return trace(times[times < duration_s], prompt, duration_s)


class Asks:
    """A policy that always asks for one action, or for one per observation."""

    def __init__(self, action):
        self.action = action

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        return np.full((len(observation), 1), self.action, dtype=np.float32), state


def test_rates_forget_as_the_simulators_do():
    made, p = poisson(3.0, 60.0, 1), plant()
    times = np.array([5.0, 5.0, 17.3, 59.0])
    brute = [
        [(np.exp((made.arrival_s[made.arrival_s <= t] - t) / w) / w).sum() for w in (1, 10, 60)]
        for t in times
    ]
    np.testing.assert_allclose(decayed_rates(made.arrival_s, times), brute, rtol=1e-12)
    batch = Batch(p, 1, RequestTable.of(p, [made]))
    batch.reset(ROW, ROW, np.array([-1]))
    for _ in range(40):
        batch.step(np.zeros(1, dtype=np.float32))
        state = batch.states[0]
        now = np.array([float(state["time_s"])])
        # the workload's last arrivals before now; later ones are not in the record yet
        seen = made.arrival_s[: int(state["tail"])]
        np.testing.assert_allclose(
            Improver._rates(state, now[0]), decayed_rates(seen, now)[0], rtol=1e-9
        )


def test_futures_are_those_of_like_moments():
    quiet, busy = poisson(0.5, 300.0, 2), poisson(8.0, 300.0, 3)
    futures = SampledFutures([quiet, busy], 4.0)
    few = [len(f.prompt) for f in futures(np.full(3, 0.5), 200)]
    many = [len(f.prompt) for f in futures(np.full(3, 8.0), 200)]
    assert np.mean(few) == pytest.approx(0.5 * 4, abs=0.6)
    assert np.mean(many) == pytest.approx(8.0 * 4, rel=0.15)
    for future in futures(np.full(3, 8.0), 20):
        assert (np.diff(future.after_s) >= 0).all()
        assert (future.after_s > 0).all()
        assert (future.after_s <= 4.0).all()
        assert len(future.after_s) == len(future.prompt)
    again = SampledFutures([quiet, busy], 4.0)
    assert [len(f.prompt) for f in again(np.full(3, 0.5), 200)] == few


def test_a_lone_request_gets_the_clock_that_is_cheapest_to_the_horizon():
    p, horizon_s = plant(), 5.0
    silent = trace([500.0], duration_s=1000.0)  # like moments are followed by nothing
    found = Improver(p, Asks(0.9), SampledFutures([silent], horizon_s), 1e6, samples=4, clocks=9)
    batch = Batch(p, 1, RequestTable.of(p, [trace([1.0], 1500)]))
    batch.reset(ROW, ROW, np.array([-1]))
    action = found.decide(batch.states[0].copy(), batch.pool, batch.obs.copy())
    tried = np.append(found.actions, np.float32(0.9))
    work, c = (1500, 0.5 * 1500**2, 0.0, 1.0), p.model.member(-1)
    mhz = p.clocks.snap_mhz(p.clocks.to_freq_mhz(tried))
    busy_s = np.array([float(p.model.latency_s(*work, f)) for f in mhz])
    idle_w = np.array([c.n_gpus * idle_power_w(c, f / 1e3) for f in mhz])
    cost = np.array([float(p.model.energy_j(*work, f)) for f in mhz])
    cost += idle_w * (horizon_s - busy_s) + 1e6 * (busy_s > p.slo.bound_s("prefill"))
    assert action == pytest.approx(tried[cost.argmin()])
    own = found._costs(batch.states[0].copy(), batch.pool, tried).mean(axis=1)
    np.testing.assert_allclose(own, cost, rtol=1e-9)


def test_a_wasteful_base_is_improved_as_far_as_late_requests_cost():
    p, made = plant(), poisson(0.4, 60.0, 5, 4000)  # too long for the lowest clock
    futures = [poisson(0.4, 200.0, 100 + k, 4000) for k in range(2)]

    def run(base, late_j=2000.0):
        improver = Improver(p, Asks(base), SampledFutures(futures, 4.0), late_j, samples=16)
        done = run_improved(improver, made)
        return done, improver.changed / improver.decisions

    batch = Batch(p, 1, RequestTable.of(p, [made]), record=True)
    batch.reset(ROW, ROW, np.array([-1]))
    while not batch.done[0]:
        batch.step(np.ones(1, dtype=np.float32))
    top_j = float(batch.states[0]["energy_j"])
    done, changed = run(1.0)
    late = done.violations - int(batch.states[0]["violations"])
    assert done.energy_j + 2000.0 * late < 0.9 * top_j, "energy and late requests, priced"
    assert changed > 0.5
    free, _ = run(1.0, late_j=0.0)
    assert free.energy_j < done.energy_j
    assert free.violations > done.violations


def test_what_has_not_arrived_is_not_looked_at():
    """Two workloads that are alike up to 12 s: the same decisions until then."""
    p, alike = plant(), poisson(2.0, 12.0, 7, 2500)
    known = [poisson(2.0, 100.0, 8, 2500)]
    later = np.array([12.5, 12.6, 12.7, 12.8])
    asked = []
    for prompt, after in ((800, later), (6000, later[:2] + 1.0)):
        prompts = np.concatenate([alike.prompt_tokens, np.full(len(after), prompt)])
        whole = trace(np.concatenate([alike.arrival_s, after]), prompts, 20.0)
        improver = Improver(p, Asks(0.0), SampledFutures(known, 3.0), 3000.0, samples=8, clocks=5)
        batch = Batch(p, 1, RequestTable.of(p, [whole]))
        batch.reset(ROW, ROW, np.array([-1]))
        mine = []
        while batch.states[0]["time_s"] < 12.0:
            mine.append(improver.decide(batch.states[0].copy(), batch.pool, batch.obs.copy()))
            batch.step(np.array(mine[-1:], dtype=np.float32))
        asked.append(mine)
    assert len(asked[0]) > 10
    assert len(set(asked[0])) > 1
    assert asked[0] == asked[1]


def test_improvement_refuses_what_it_cannot_try():
    with pytest.raises(BiscaleError, match="need known workloads of more than 25 s"):
        SampledFutures([poisson(1.0, 20.0, 1)], 5.0)
    futures = SampledFutures([poisson(1.0, 60.0, 1)], 5.0)
    decode = Plant(PlantSettings.of("decode"))
    with pytest.raises(BiscaleError, match="is for prefill"):
        Improver(decode, Asks(0.0), futures, 1.0)
    p, jam = plant(), trace(np.linspace(0.0, 0.01, 600))
    improver = Improver(p, Asks(1.0), futures, 1.0, samples=2, clocks=2)
    with pytest.raises(BiscaleError, match="more than 512 requests wait"):
        run_improved(improver, jam)
