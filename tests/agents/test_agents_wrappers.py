"""The recipe on the public environments is that of the trainer."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

from agents.training.train_config import AgentConfig, Part, Randomise, load_config
from agents.training.worlds.episodes import Episodes
from agents.training.worlds.mixture import make_groups
from agents.training.worlds.training_env import AgentVecEnv
from agents.wrappers import AgentFeatures, RuleAction, TrainingReward, agent_env, save_agent
from biscale_env.core.errors import BiscaleError
from biscale_env.policies import resolve_policy

SMALL: dict[str, Any] = {"rate_rps": 4.0, "episode_s": 8.0, "n_workloads": 3}
IDS = {"prefill": "BiScale/Prefill-v1", "decode": "BiScale/Decode-v1"}


def config_of(phase: str, price: tuple[float, float] | None) -> AgentConfig:
    base = load_config(None, phase)
    part = Part(rates_rps=(4.0,), episode_s=8.0, workloads=3)
    fixed = Randomise(delay_s=(0.03, 0.03), nominal_share=0.5)
    changes = {"mixture": (part,), "randomise": fixed, "price": price, "n_envs": 1, "margins": ()}
    return base.model_copy(update=changes)


@pytest.mark.parametrize("price", [(1.0, 100.0), None])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_features_rewards_and_ends_are_those_of_the_trainer(phase: str, price: Any) -> None:
    config = config_of(phase, price)
    groups, counts = make_groups(config)
    trainer = AgentVecEnv(config, groups, counts, seed=0)
    public = agent_env(phase, config, update_every=10**9, **SMALL)
    one = np.ones(1)
    rng, charged = np.random.default_rng(0), 0.0
    for workload, member, penalty in ((1, -1, 3.0), (2, 5, 60.0)):
        episode = Episodes(
            np.zeros(1, dtype=np.int64),
            np.array([workload]),
            np.array([member]),
            penalty * one if price else config.constraint.start * one,
            groups[0].slo_s * one,
            0.03 * one,
        )
        trainer.sampler.sample = lambda n, episode=episode: episode  # type: ignore[method-assign]
        theirs = trainer.reset()
        options = {"workload": workload, "member": member}
        ours, _ = public.reset(options=options | ({"price": penalty} if price else {}))
        np.testing.assert_array_equal(ours, theirs[0])
        over = False
        while not over:
            output = rng.uniform(-1, 1, (1, 1)).astype(np.float32)
            trainer.step_async(output)
            theirs, reward, done, infos = trainer.step_wait()
            ours, mine, _, over, info = public.step(output[0])
            assert over == done[0]
            np.testing.assert_array_equal(ours, infos[0].get("terminal_observation", theirs[0]))
            assert mine == pytest.approx(reward[0], rel=1e-5, abs=1e-6)
            charged += info["cost"]
        for duals in (trainer.duals, public.get_wrapper_attr("meter").duals):
            duals.update(np.array([0.99]))  # the differential term joins in
        assert trainer.duals.cost_rate == pytest.approx(
            public.get_wrapper_attr("meter").duals.cost_rate
        )
    assert np.any(trainer.duals.cost_rate != 0)


def test_prices_are_drawn_within_the_range_and_repeat_with_the_seed() -> None:
    env = AgentFeatures(gym.make(IDS["prefill"], **SMALL), price=(2.0, 50.0))
    env.reset(seed=1)
    first = [env.price]
    for _ in range(30):
        env.reset()
        first.append(env.price)
    assert 2.0 <= min(first) < 6.0 < 20.0 < max(first) <= 50.0
    env.reset(seed=1)
    assert env.price == first[0]
    assert env.observation_space.contains(env.step(env.action_space.sample())[0])


def test_zero_output_is_the_rule() -> None:
    env = RuleAction(AgentFeatures(gym.make(IDS["prefill"], **SMALL)))
    env.reset(seed=0)
    rule = env.get_wrapper_attr("rule").copy()
    env.step(np.zeros(1))
    plant = env.unwrapped.plant
    asked = float(plant.clocks.snap_mhz(plant.clocks.to_freq_mhz(rule))[0])
    assert env.unwrapped.batch.states["requested_ghz"][0] * 1e3 == pytest.approx(asked)


def test_mistakes_are_sentences() -> None:
    plain = gym.make(IDS["prefill"], **SMALL)
    config = config_of("prefill", (1.0, 10.0))
    for wrong, says in (
        (lambda: RuleAction(plain), "AgentFeatures"),
        (lambda: RuleAction(AgentFeatures(plain), "faster"), "rule, clock or levels"),
        (lambda: AgentFeatures(plain, (0.0, 1.0)), "price"),
        (lambda: TrainingReward(AgentFeatures(plain), config), "price of the config"),
        (lambda: TrainingReward(AgentFeatures(plain), config_of("decode", None)), "for decode"),
        (lambda: agent_env("both"), "prefill or decode"),
    ):
        with pytest.raises(BiscaleError, match=says):
            wrong()


@pytest.mark.slow
def test_a_model_of_stable_baselines_becomes_a_policy(tmp_path: Any) -> None:
    """PPO learns in the public environment; its network, written out, decides the same clocks."""
    import torch
    from stable_baselines3 import PPO

    config = config_of("prefill", (1.0, 100.0))
    env = agent_env("prefill", config, update_every=64, **SMALL)
    layers = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": torch.nn.Tanh}
    model = PPO("MlpPolicy", env, n_steps=64, batch_size=64, policy_kwargs=layers, seed=0)
    model.learn(128)
    path = save_agent(model, env, tmp_path / "mine.npz", config)
    plain = gym.make(IDS["prefill"], **SMALL)
    policy = resolve_policy(f"{path}:price=10", plain.unwrapped.plant)
    raw, _ = plain.reset(seed=3)
    told = AgentFeatures(gym.make(IDS["prefill"], **SMALL), (1.0, 100.0))
    seen = RuleAction(told, config.action, config.span)
    features, _ = seen.reset(seed=3, options={"price": 10.0})
    for _ in range(10):
        output, _ = model.predict(features, deterministic=True)
        features = seen.step(output)[0]
        action, _ = policy.predict(raw)
        raw = plain.step(action)[0]
        np.testing.assert_allclose(
            seen.unwrapped.batch.states["requested_ghz"],
            plain.unwrapped.batch.states["requested_ghz"],
        )
