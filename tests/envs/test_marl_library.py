"""A MARL library on the PettingZoo form: TorchRL's IPPO, one shared network per phase.

Extra ``rl-libs``; the loop is that of docs/many-agents.md.
"""

from typing import Any

import pytest

pytest.importorskip("torchrl")
pytest.importorskip("pettingzoo")
pytestmark = pytest.mark.slow

PHASES = ("prefill", "decode")


def actor_and_critic(env: Any, phase: str) -> tuple[Any, Any]:
    """A network of the agents of a phase, and what it expects of each."""
    import torch
    from tensordict.nn import TensorDictModule
    from tensordict.nn.distributions import NormalParamExtractor
    from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal

    n = len(env.group_map[phase])
    dim = env.observation_spec[phase, "observation"].shape[-1]
    kind: dict[str, Any] = {
        "n_agent_inputs": dim,
        "n_agents": n,
        "centralised": False,
        "share_params": True,
        "depth": 1,
        "num_cells": 16,
    }
    body = torch.nn.Sequential(MultiAgentMLP(n_agent_outputs=2, **kind), NormalParamExtractor())
    shown, told = [(phase, "observation")], [(phase, "loc"), (phase, "scale")]
    actor = ProbabilisticActor(
        TensorDictModule(body, shown, told),
        in_keys=told,
        out_keys=[(phase, "action")],
        distribution_class=TanhNormal,
        return_log_prob=True,
        log_prob_key=(phase, "log_prob"),
    )
    value = MultiAgentMLP(n_agent_outputs=1, **kind)
    return actor, TensorDictModule(value, shown, [(phase, "state_value")])


def test_ippo_of_torchrl_learns_with_a_shared_network_per_phase() -> None:
    """Two updates: finite losses, weights that moved, all agents of a phase through one network."""
    import torch
    from tensordict.nn import TensorDictSequential
    from torchrl.envs import PettingZooWrapper
    from torchrl.objectives import ClipPPOLoss

    from biscale_env.envs.cluster.parallel_env import ClusterParallelEnv

    torch.manual_seed(0)
    base = ClusterParallelEnv(episode_s=2.0, rate_rps=20.0)
    groups = {p: [a for a in base.possible_agents if a.startswith(p)] for p in PHASES}
    env = PettingZooWrapper(base, group_map=groups)
    pairs = {phase: actor_and_critic(env, phase) for phase in PHASES}
    losses, optimisers = {}, {}
    for phase, (actor, critic) in pairs.items():
        loss = ClipPPOLoss(actor, critic, entropy_coeff=0.0, normalize_advantage=False)
        loss.set_keys(
            action=(phase, "action"),
            sample_log_prob=(phase, "log_prob"),
            value=(phase, "state_value"),
            reward=(phase, "reward"),
            done=(phase, "done"),
            terminated=(phase, "terminated"),
        )
        loss.make_value_estimator(gamma=0.99, lmbda=0.95)
        losses[phase] = loss
        optimisers[phase] = torch.optim.Adam(loss.parameters(), lr=1e-2)
    everybody = TensorDictSequential(*(actor for actor, _ in pairs.values()))
    before = [p.detach().clone() for actor, _ in pairs.values() for p in actor.parameters()]
    for _ in range(2):
        with torch.no_grad():
            batch = env.rollout(20, everybody)
        assert batch.batch_size == torch.Size([20])
        for phase, loss in losses.items():
            assert batch[phase, "action"].shape == (20, len(groups[phase]), 1)
            assert (batch["next", phase, "reward"] < 0).any()
            with torch.no_grad():
                loss.value_estimator(batch, params=loss.critic_network_params)
            made = loss(batch)
            total = made["loss_objective"] + made["loss_critic"]
            assert torch.isfinite(total)
            optimisers[phase].zero_grad()
            total.backward()
            optimisers[phase].step()
    after = [p for actor, _ in pairs.values() for p in actor.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
