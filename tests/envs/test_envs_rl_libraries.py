"""RL libraries run on the environments without an adapter: CleanRL's loop, Tianshou, RLlib.

Tianshou: extra ``rl-libs``. RLlib pins a Gymnasium of its own: extra ``rllib``, in an environment
apart (``make test-rllib``). What is not installed is skipped.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import biscale_env  # noqa: F401 - registers the ids

pytestmark = pytest.mark.slow
IDS = ["BiScale/Prefill-v1", "BiScale/Decode-v1"]
SMALL: dict[str, Any] = {"rate_rps": 6.0, "episode_s": 4.0, "n_workloads": 4}


@pytest.mark.parametrize("env_id", IDS)
def test_the_loop_of_cleanrl(env_id: str) -> None:
    """Its PPO: episode statistics, observations from ``make_vec``, values at NEXT_STEP resets."""
    torch = pytest.importorskip("torch")
    envs = gym.make_vec(env_id, num_envs=3, autoreset_mode="NEXT_STEP", **SMALL)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
    actor = torch.nn.Linear(envs.single_observation_space.shape[0], 1)
    next_obs, _ = envs.reset(seed=1)
    returns = []
    for _ in range(900):
        with torch.no_grad():
            action = torch.distributions.Normal(actor(torch.Tensor(next_obs)), 0.3).sample()
        next_obs, reward, terminations, truncations, infos = envs.step(action.numpy())
        assert np.isfinite(reward).all()
        if "episode" in infos:
            returns += infos["episode"]["r"][np.logical_or(terminations, truncations)].tolist()
        if len(returns) > 5:
            break
    assert len(returns) > 5
    assert max(returns) < 0


@pytest.mark.parametrize("env_id", IDS)
def test_ppo_of_tianshou_learns_on_it(env_id: str) -> None:
    """Two updates from its collector: finite losses, weights that moved, whole episodes."""
    pytest.importorskip("tianshou", minversion="2.0")
    import torch
    from tianshou.algorithm.modelfree.ppo import PPO
    from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv
    from tianshou.utils.net.common import Net
    from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
    from tianshou.utils.torch_utils import policy_within_training_step

    envs = DummyVectorEnv([lambda: gym.make(env_id, **SMALL) for _ in range(2)])
    space = gym.make(env_id, **SMALL)
    shape = space.observation_space.shape
    actor = ContinuousActorProbabilistic(
        preprocess_net=Net(state_shape=shape, hidden_sizes=[8]),
        action_shape=(1,),
        unbounded=True,
    )
    policy = ProbabilisticActorPolicy(
        actor=actor,
        dist_fn=lambda of: torch.distributions.Independent(torch.distributions.Normal(*of), 1),
        action_space=space.action_space,
    )
    critic = ContinuousCritic(preprocess_net=Net(state_shape=shape, hidden_sizes=[8]))
    algorithm = PPO(policy=policy, critic=critic, optim=AdamOptimizerFactory(lr=1e-2))
    collector = Collector(algorithm, envs, VectorReplayBuffer(2000, 2))
    before = actor.mu.model[0].weight.detach().clone()
    collector.reset()
    ended = 0
    with policy_within_training_step(policy):
        for _ in range(2):
            collected = collector.collect(n_episode=2)
            ended += collected.n_collected_episodes
            assert np.isfinite(collected.returns).all()
            assert (collected.returns < 0).all()
            algorithm.update(collector.buffer, batch_size=32, repeat=1)
            collector.reset_buffer()
    assert ended == 4
    after = actor.mu.model[0].weight
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("env_id", IDS)
def test_ppo_of_rllib_learns_on_it(env_id: str) -> None:
    """The id with its module, as Ray's workers need it; one iteration in this process."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.rllib")
    from ray.rllib.algorithms.ppo import PPOConfig

    ray.init(num_cpus=1, include_dashboard=False, ignore_reinit_error=True, log_to_driver=False)
    try:
        config = (
            PPOConfig()
            .environment(f"biscale_env:{env_id}", env_config=SMALL)
            .env_runners(num_env_runners=0, num_envs_per_env_runner=2)
            .learners(num_learners=0)
            .training(train_batch_size_per_learner=400, minibatch_size=100, num_epochs=1)
        )
        algorithm = config.build_algo()
        found = algorithm.train()
        algorithm.stop()
    finally:
        ray.shutdown()
    told = found["env_runners"]
    assert told["num_episodes_lifetime"] >= 1
    assert told["episode_return_mean"] < 0
    assert np.isfinite(found["learners"]["default_policy"]["total_loss"])
