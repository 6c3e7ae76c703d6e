"""Steps and resets per second of the environments, beside CartPole in the same process."""

import time

import gymnasium as gym
import numpy as np
import pytest
from meter import Meter, Metric

import biscale_env  # noqa: F401  registers the environments
from biscale_env.envs.vector import PhaseVectorEnv

RATE_RPS = 3.0  # busy, never empty for long
PHASES = ("prefill", "decode")
NUM_ENVS, VECTOR_STEPS, SINGLE_STEPS = 1024, 50, 2000
RESET_STEPS = {"prefill": 60_000, "decode": 1_500_000}  # some 300 episodes


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
def test_vector_steps(meter: Meter, phase: str) -> None:
    """Native vector environment with random actions; episodes end and restart meanwhile."""
    env = PhaseVectorEnv(phase, NUM_ENVS, rate_rps=RATE_RPS)
    env.reset(seed=0)
    actions = actions_of(NUM_ENVS, VECTOR_STEPS)

    def window() -> None:
        for action in actions:
            env.step(action)

    for _ in range(8):  # past the first, common start of all episodes
        window()
    n = NUM_ENVS * VECTOR_STEPS
    name = f"vector env, {phase}, {NUM_ENVS} environments"
    meter.rate(window, n, name, "steps/s", 3e6)


@pytest.mark.parametrize("phase", PHASES)
def test_single_steps(meter: Meter, phase: str) -> None:
    """Steps per second through gymnasium.make within one long episode."""
    env = gym.make(
        f"BiScale/{phase.capitalize()}-v1", rate_rps=RATE_RPS, episode_s=3600.0, n_workloads=1
    )
    env.reset(seed=0)
    actions = [a[0] for a in actions_of(1, 64)]

    def window() -> None:
        for k in range(SINGLE_STEPS):
            if env.step(actions[k % 64])[3]:
                env.reset()

    meter.rate(window, SINGLE_STEPS, f"gymnasium.make, {phase}", "steps/s", 100e3)


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
def test_resets(meter: Meter, phase: str) -> None:
    """Median reset of the default environment, and what resets leave of the step rate."""
    env = gym.make(f"BiScale/{phase.capitalize()}-v1")
    env.reset(seed=0)
    timed_episodes(env, 4000)  # compiles; most workloads are still to be made
    resets, stepping, total = meter.once(lambda: timed_episodes(env, RESET_STEPS[phase]))
    meter.keep(
        Metric(
            f"reset, {phase}, default episodes, median",
            float(np.median(resets)) * 1e3,
            "ms",
            0.5,
            "lower",
            float(resets.max()) * 1e3,
            "worst",
        ),
        Metric(
            f"step rate with resets over without, {phase}", stepping / total, "x", 0.85, "higher"
        ),
    )


@pytest.mark.parametrize("phase", PHASES)
def test_beside_cartpole(meter: Meter, phase: str) -> None:
    """Rates of the default environments, resets included, as multiples of the single CartPole."""
    single = gym.make(f"BiScale/{phase.capitalize()}-v1")
    single.reset(seed=0)
    vector = gym.make_vec(f"BiScale/{phase.capitalize()}-v1", num_envs=NUM_ENVS)
    vector.reset(seed=0)
    actions = actions_of(NUM_ENVS, VECTOR_STEPS)

    def many() -> None:
        for action in actions:
            vector.step(action)

    timed_episodes(single, 4000)
    best = min(timed_episodes(single, 20_000)[2] for _ in range(3))
    vector_s, _ = meter.run(many)
    cartpole = cartpole_steps_per_s()
    together = NUM_ENVS * VECTOR_STEPS / vector_s / cartpole
    meter.keep(
        Metric(f"single env, {phase}, over CartPole", 20_000 / best / cartpole, "x", 2.0, "higher"),
        Metric(f"vector env, {phase}, {NUM_ENVS}, over CartPole", together, "x", 60.0, "higher"),
    )
