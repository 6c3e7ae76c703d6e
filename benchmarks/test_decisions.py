"""Latency of single decisions, asked alone as an engine would, and learning with PPO."""

import time

import numpy as np
import pytest
from meter import Meter, Metric

from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.rollouts.rollout import time_decisions
from biscale_env.policies import resolve_policy
from biscale_env.traces import generate

DECISIONS = [
    ("prefill", "mpc-dompc", "ms", 4.0),
    ("prefill", "mpc", "ms", 4.0),
    ("decode", "slack", "us", 20.0),
    ("prefill", "agent", "us", 20.0),
    ("decode", "agent", "us", 20.0),
]


def busy_observations(plant: Plant, n: int = 200, rate_rps: float = 4.0) -> np.ndarray:
    """Observations of a busy instance under random clocks, ``(n, dim)``."""
    trace = generate("azure-conv-like", rate_rps=rate_rps, duration_s=600.0, seed=0)
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]))
    zero = np.zeros(1, dtype=np.int64)
    batch.reset(zero, zero, zero - 1)
    rng = np.random.default_rng(0)
    kept: list[np.ndarray] = []
    while len(kept) < n and not batch.done[0]:
        kept.append(batch.obs[0].copy())
        batch.step(rng.uniform(-1, 1, 1).astype(np.float32))
    return np.array(kept)


@pytest.mark.benchmark(timer=time.perf_counter)
@pytest.mark.parametrize(("phase", "name", "unit", "target"), DECISIONS)
def test_decision(meter: Meter, phase: str, name: str, unit: str, target: float) -> None:
    """Median wall time of a decision, and its P99."""
    plant = Plant(PlantSettings.of(phase))
    policy = resolve_policy(name, plant)
    observations = busy_observations(plant)
    median_s, p99_s = meter.once(lambda: time_decisions(policy, observations))
    factor = {"ms": 1e3, "us": 1e6}[unit]
    label = f"{name}, {phase}, decision latency, median"
    meter.keep(Metric(label, median_s * factor, unit, target, "lower", p99_s * factor, "p99"))


def test_ppo_learns(meter: Meter) -> None:
    """Environment steps per second of CPU time with the shipped prefill configuration."""
    pytest.importorskip("stable_baselines3")
    from agents.training.run import make_model
    from agents.training.train_config import load_config
    from agents.training.worlds.mixture import make_groups
    from agents.training.worlds.training_env import AgentVecEnv

    config = load_config(None, "prefill")
    generated = tuple(
        part.model_copy(update={"workloads": 4}) for part in config.mixture if part.trace is None
    )
    config = config.model_copy(update={"mixture": generated, "anneal": False})
    model = make_model(config, AgentVecEnv(config, *make_groups(config), config.seed), None)
    steps = config.n_envs * int(config.hyper["n_steps"])

    def learn() -> None:
        model.learn(steps, reset_num_timesteps=False)

    name = f"PPO learns, prefill, {config.n_envs} environments, one core"
    meter.rate(learn, steps, name, "steps/s", 60e3, rounds=8)
