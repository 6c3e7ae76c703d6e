"""Rewards of named terms, the constrained form, and discounting by time."""

import json
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import biscale_env  # noqa: F401 - registers the ids
from biscale_env.core.errors import BiscaleError
from biscale_env.wrappers import (
    TERMS,
    CostStep,
    EnergyReward,
    NamedReward,
    RandomisedPlant,
    RewardTerm,
    TimeDiscount,
)

IDS = ["BiScale/Prefill-v1", "BiScale/Decode-v1"]
SMALL: dict[str, Any] = {"rate_rps": 6.0, "episode_s": 6.0}


def play(env: gym.Env, steps: int = 40, seed: int = 0) -> list[tuple]:
    env.action_space.seed(1)
    env.reset(seed=seed)
    rows = []
    for _ in range(steps):
        rows.append(env.step(env.action_space.sample()))
        if rows[-1][-2]:
            break
    return rows


@pytest.mark.parametrize("env_id", IDS)
def test_the_default_terms_are_the_reward_of_the_environment(env_id: str) -> None:
    plain = play(gym.make(env_id, **SMALL))
    named = play(NamedReward(gym.make(env_id, **SMALL)))
    for one, two in zip(plain, named, strict=True):
        assert two[1] == pytest.approx(one[1], rel=1e-12)
        parts = two[-1]["reward_terms"]
        assert set(parts) == {"energy", "slo"}
        assert sum(parts.values()) == pytest.approx(two[1], rel=1e-12)


@pytest.mark.parametrize("env_id", IDS)
def test_every_term_is_what_its_table_says(env_id: str) -> None:
    env = NamedReward(gym.make(env_id, **SMALL), list(TERMS))
    plant = env.unwrapped.plant
    env.reset(seed=0)
    asked = plant.clocks.freq_max_mhz
    span = asked - plant.clocks.freq_min_mhz
    for action in (0.5, -0.5, -0.5, 1.0):
        observation, reward, *_, info = env.step(np.array([action], dtype=np.float32))
        parts, st = info["reward_terms"], env.unwrapped.batch.states[0]
        now = float(plant.clocks.snap_mhz(plant.clocks.to_freq_mhz(action)))
        busy_j = info["energy_j"] - float(st["step_energy_idle_j"])
        name = "queue_requests" if "Prefill" in env_id else "waiting_requests"
        waiting = float(plant.spec.value(observation, name))
        assert parts == pytest.approx(
            {
                "energy": -info["energy_j"] / plant.energy_ref_j,
                "slo": -30.0 * info["cost"],
                "misses": -info["cost"],
                "busy_energy": -busy_j / plant.energy_ref_j,
                "clock_change": -abs(now - asked) / span,
                "waiting": -waiting * info["dt"],
            }
        )
        asked = now
        assert reward == pytest.approx(sum(parts.values()))


def test_a_term_of_ones_own_and_another_weight() -> None:
    power = RewardTerm("power", "minus mean power, kW", lambda s: -s.energy_j / s.dt_s / 1e3)
    env = NamedReward(gym.make(IDS[1], **SMALL), ["energy", TERMS["slo"].times(2.0), power])
    *_, info = play(env, 3)[-1]
    assert info["reward_terms"]["power"] == pytest.approx(-info["energy_j"] / info["dt"] / 1e3)
    assert TERMS["slo"].weight == 1.0


@pytest.mark.parametrize("terms", [[], ["energy", "energy"], ["enrgy"]])
def test_terms_that_make_no_reward(terms: list[str]) -> None:
    with pytest.raises(BiscaleError, match=r"terms|'energy'"):
        NamedReward(gym.make(IDS[0], **SMALL), terms)


def test_another_environment_is_one_sentence() -> None:
    with pytest.raises(BiscaleError, match=r"BiScale/Prefill-v1.*got CartPoleEnv"):
        NamedReward(gym.make("CartPole-v1"))


@pytest.mark.parametrize("env_id", IDS)
def test_cost_stands_apart_from_energy(env_id: str) -> None:
    plain = play(gym.make(env_id, **SMALL))
    energy = play(EnergyReward(gym.make(env_id, **SMALL)))
    safe = play(CostStep(gym.make(env_id, **SMALL)))
    for one, two, six in zip(plain, energy, safe, strict=True):
        assert len(six) == 6
        assert six[2] == one[-1]["cost"] >= 0
        assert two[1] == six[1] == pytest.approx(one[1] + 30.0 * six[2])


@pytest.mark.parametrize("env_id", IDS)
def test_discounts_multiply_to_that_of_the_time(env_id: str) -> None:
    env = TimeDiscount(gym.make(env_id, **SMALL), horizon_s=3.0)
    begin_s = env.reset(seed=0)[1]["time_s"]
    kept = 1.0
    for *_, info in (env.step(np.zeros(1, dtype=np.float32)) for _ in range(12)):
        kept *= info["discount"]
        assert kept == pytest.approx(math.exp(-(info["time_s"] - begin_s) / 3.0), rel=1e-9)


def test_random_ends_are_the_discounted_sum_in_the_mean() -> None:
    """The sum up to a random end estimates the discounted sum: within four standard errors."""
    options = {"rate_rps": 6.0, "episode_s": 6.0}
    told = TimeDiscount(gym.make(IDS[1], **options), horizon_s=0.5)
    told.reset(seed=0, options={"workload": 2})
    total, kept, over = 0.0, 1.0, False
    while not over:
        *_, reward, _, over, info = told.step(np.zeros(1, dtype=np.float32))
        total += kept * reward
        kept *= info["discount"]
    ends = TimeDiscount(gym.make(IDS[1], **options), horizon_s=0.5, terminate=True)
    ends.reset(seed=1)
    sums = []
    for _ in range(400):
        ends.reset(options={"workload": 2})
        sums.append(0.0)
        over = False
        while not over:
            *_, reward, terminated, truncated, _ = ends.step(np.zeros(1, dtype=np.float32))
            sums[-1] += reward
            over = terminated or truncated
    assert abs(np.mean(sums) - total) < 4 * np.std(sums) / np.sqrt(len(sums))


@pytest.mark.parametrize("horizon", [0.0, -1.0, math.inf, math.nan])
def test_a_horizon_that_is_none(horizon: float) -> None:
    with pytest.raises(BiscaleError, match="horizon_s"):
        TimeDiscount(gym.make(IDS[0], **SMALL), horizon)


def test_a_discount_by_time_prefers_the_clock_that_costs_least_one_by_step_does_not() -> None:
    """Decode at 75 %: 810 MHz costs less than 1005 MHz, whose steps are shorter."""
    env = TimeDiscount(gym.make(IDS[1]), horizon_s=10.0)
    by_step, by_time, whole = {}, {}, {}
    for mhz in (810.0, 1005.0):
        action = env.unwrapped.plant.clocks.to_action([mhz])
        env.reset(seed=0, options={"workload": 0})
        rewards, kept, over = [], [], False
        while not over:
            *_, reward, _, over, info = env.step(action)
            rewards.append(reward)
            kept.append(info["discount"])
        whole[mhz] = info["kpis"]["energy_ratio"]
        by_step[mhz] = mean_return(rewards, [0.99] * len(rewards))
        by_time[mhz] = mean_return(rewards, kept)
    assert whole[810.0] < whole[1005.0]
    assert by_time[810.0] > by_time[1005.0]
    assert by_step[810.0] < by_step[1005.0]


def mean_return(rewards: list[float], discounts: list[float]) -> float:
    """Mean over the steps of an episode of the discounted sum from there on, but its last part."""
    sums, after = [], 0.0
    for reward, kept in zip(reversed(rewards), reversed(discounts), strict=True):
        after = reward + kept * after
        sums.append(after)
    return float(np.mean(sums[len(sums) // 4 :]))


def test_wrappers_with_plain_arguments_are_in_the_spec() -> None:
    env = TimeDiscount(gym.make(IDS[0], **SMALL), horizon_s=4.0)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.horizon_s == 4.0
    assert json.loads(again.spec.to_json()) == json.loads(env.spec.to_json())


def test_a_random_plant_per_episode() -> None:
    env = RandomisedPlant(gym.make(IDS[0], **SMALL), (0.01, 0.2), (0.5, 2.0), nominal_share=0.5)
    nominal = env.unwrapped.plant.slo.ttft_s
    seen = []
    for k in range(40):
        observation, info = env.reset(seed=0 if k == 0 else None)
        params = env.unwrapped.batch.params[0]
        spec = env.unwrapped.plant.spec
        assert spec.value(observation, "slo") == pytest.approx(params["slo_s"], rel=1e-6)
        assert 0.01 <= params["delay_s"] <= 0.2
        assert 0.5 * nominal <= params["slo_s"] <= 2.0 * nominal
        assert params["delay_s"] == pytest.approx(spec.value(observation, "actuation_delay"))
        seen.append((info["ensemble_member"], float(params["slo_s"]), info["workload"]))
        env.step(env.action_space.sample())
    members = [member for member, *_ in seen]
    assert 10 <= members.count(-1.0) <= 30
    assert len(set(members)) > 10
    again = RandomisedPlant(gym.make(IDS[0], **SMALL), (0.01, 0.2), (0.5, 2.0), nominal_share=0.5)
    again.reset(seed=0)
    assert float(again.unwrapped.batch.params[0]["slo_s"]) == seen[0][1]
    plain = gym.make(IDS[0], **SMALL)
    assert plain.reset(seed=0)[1]["workload"] == seen[0][2]


@pytest.mark.parametrize(
    "options", [{"delay_s": (0.2, 0.1)}, {"slo_scale": (0.0, 1.0)}, {"nominal_share": 1.5}]
)
def test_ranges_of_a_random_plant_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(BiscaleError, match=next(iter(options))):
        RandomisedPlant(gym.make(IDS[0], **SMALL), **options)
