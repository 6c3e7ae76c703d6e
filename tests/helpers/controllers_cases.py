"""Plants, observations and recorded states that the controller tests share."""

from functools import cache

import numpy as np

from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.traces import Trace
from controllers import context_of, make_policy


@cache
def plant(phase: str, **settings) -> Plant:
    return Plant(PlantSettings.of(phase, **settings))


def context(phase: str, member: int = -1, **settings):
    return context_of(plant(phase, **settings), member)


def encode(phase: str, **values):
    """Observation (dim,) with the given physical values.

    Clocks settled at the highest, SLO as configured, no deadlines.
    """
    w = plant(phase)
    x = np.zeros(w.spec.dim)
    defaults = {
        "slo": w.slo.bound_s(phase),
        "freq_current": 1980.0,
        "freq_pending": 1980.0,
        "actuation_delay": 0.05,
    }
    for name, value in {**defaults, **values}.items():
        x[w.spec.index(name)] = value
    return w.spec.encode(x)


def queue(batches, **values):
    """Prefill observation of a queue.

    Per projected batch (tokens, tightest slack in SLOs), every batch one prompt that completes.
    """
    none = {f"{name}_{k}": 10.0 for name in ("batch_slack", "batch_slack_alive") for k in range(8)}
    seen = {}
    for k, (tokens, slack) in enumerate(batches):
        seen |= {
            f"batch_tokens_{k}": tokens,
            f"batch_attn_{k}": 0.5 * tokens**2,
            f"batch_requests_{k}": 1,
            f"batch_completing_{k}": 1,
        }
        seen |= {f"batch_slack_{k}": slack, f"batch_slack_alive_{k}": slack if slack > 0 else 10.0}
    total = {"queue_requests": len(batches), "queue_tokens": sum(t for t, _ in batches)}
    return encode("prefill", **{**none, **seen, **total, **values})


def workload(phase: str, rate_rps: float, seconds: float, seed: int) -> Trace:
    """Bursty arrivals with long-tailed prompts: enough variety to reach every part of the rules."""
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(0.5, 2.0 / rate_rps, size=int(rate_rps * seconds) + 1)
    n = len(gaps)
    prompt = np.clip(rng.lognormal(6.5, 0.9, n), 8, 6000).astype(np.int32)
    output = np.clip(rng.lognormal(4.5, 0.8, n), 2, 600).astype(np.int32)
    return Trace(f"bursts-{seed}", np.cumsum(gaps), prompt, output, "test")


@cache
def recorded(phase: str, n: int, rate_rps: float = 3.0, seed: int = 0):
    """``n`` observations in a row of random-clock runs, (n, dim)."""
    w = plant(phase)
    policy = make_policy("random", context_of(w), seed=seed)
    rows = []
    while len(rows) < n:
        trace = workload(phase, rate_rps, 60.0, seed + len(rows))
        batch = Batch(w, 1, RequestTable.of(w, [trace]))
        batch.reset(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), np.array([-1]))
        while not batch.done[0] and len(rows) < n:
            rows.append(batch.obs[0].copy())
            batch.step(policy.predict(batch.obs)[0][:, 0])
    return np.array(rows)


def clock_of(policy, observation) -> np.ndarray:
    """Supported clock that a policy's answer means, MHz.

    () for one observation, (n,) for several.
    """
    action, _ = policy.predict(observation)
    clocks = policy.context.clocks
    return clocks.snap_mhz(clocks.to_freq_mhz(action))[..., 0]
