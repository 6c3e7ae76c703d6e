"""Steps and resets per second of the environments, beside Gymnasium's CartPole in the same process."""

import time

import gymnasium as gym
import numpy as np
import pytest
from meter import Meter, Metric

import biscale_env  # noqa: F401  registers the environments
from biscale_env.envs.vector import PhaseVectorEnv

RATE_RPS = 3.0  # busy, never empty for long
PHASES = ("prefill", "decode")


def cartpole_steps_per_s(steps: int = 20_000) -> float:
    """Best rate of the single CartPole, resets included, CPU time."""
    env = gym.make("CartPole-v1")
    env.reset(seed=0)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for k in range(steps):
            _, _, terminated, truncated, _ = env.step(k % 2)
            if terminated or truncated:
                env.reset()
        best = min(best, time.process_time() - start)
    return steps / best


def actions_of(num_envs: int, steps: int) -> list[np.ndarray]:
    """Random actions, the same for every run."""
    rng = np.random.default_rng(0)
    return [rng.uniform(-1, 1, (num_envs, 1)).astype(np.float32) for _ in range(steps)]


@pytest.mark.parametrize("phase", PHASES)
def test_vector_steps(meter: Meter, phase: str, num_envs: int = 1024, steps: int = 50) -> None:
    """Native vector environment with random actions; episodes end and restart meanwhile."""
    env = PhaseVectorEnv(phase, num_envs, rate_rps=RATE_RPS)
    env.reset(seed=0)
    actions = actions_of(num_envs, steps)

    def window() -> None:
        for action in actions:
            env.step(action)

    for _ in range(8):  # past the first, common start of all episodes
        window()
    n = num_envs * steps
    meter.rate(window, n, f"vector env, {phase}, {num_envs} environments", "steps/s", 3e6)


@pytest.mark.parametrize("phase", PHASES)
def test_single_steps(meter: Meter, phase: str, steps: int = 2000) -> None:
    """Steps per second through gymnasium.make within one long episode."""
    env = gym.make(
        f"BiScale/{phase.capitalize()}-v0", rate_rps=RATE_RPS, episode_s=3600.0, n_workloads=1
    )
    env.reset(seed=0)
    actions = [a[0] for a in actions_of(1, 64)]

    def window() -> None:
        for k in range(steps):
            if env.step(actions[k % 64])[3]:
                env.reset()

    meter.rate(window, steps, f"gymnasium.make, {phase}", "steps/s", 100e3)


def timed_episodes(env: gym.Env, steps: int) -> tuple[np.ndarray, float, float]:
    """CPU times of the resets; CPU time of all steps; wall of both, s."""
    actions = [a[0] for a in actions_of(1, 64)]
    resets, stepping, start = [], 0.0, time.process_time()
    done = 0
    while done < steps:
        before = time.process_time()
        env.reset()
        began = time.process_time()
        resets.append(began - before)
        over = False
        while not over and done < steps:
            over = env.step(actions[done % 64])[3]
            done += 1
        stepping += time.process_time() - began
    return np.array(resets), stepping, time.process_time() - start


@pytest.mark.parametrize("phase", PHASES)
def test_resets(meter: Meter, phase: str, steps: int = 60_000) -> None:
    """Median reset of the default environment, and what resets leave of the step rate."""
    env = gym.make(f"BiScale/{phase.capitalize()}-v0")
    env.reset(seed=0)
    timed_episodes(env, 4000)  # warm-up
    resets, stepping, total = meter.once(lambda: timed_episodes(env, steps))
    meter.keep(
        Metric(
            f"reset, {phase}, default episodes, median", float(np.median(resets)) * 1e3, "ms", 0.5,
            "lower", float(resets.max()) * 1e3, "worst",
        ),
        Metric(f"step rate with resets over without, {phase}", stepping / total, "x", 0.85, "higher"),
    )  # fmt: skip


def test_beside_cartpole(meter: Meter) -> None:
    """Rates of ours, resets included, as multiples of CartPole's single environment."""
    cartpole = meter.once(cartpole_steps_per_s)
    meter.keep(Metric("CartPole-v1, single, resets included", cartpole, "steps/s", 1.0, "higher"))
