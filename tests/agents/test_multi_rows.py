"""Agents of several clusters as rows: what the PettingZoo environments say, in the same places."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("pettingzoo")
pytest.importorskip("stable_baselines3")

from agents.multi.cluster_rows import ClusterRows, Outcome
from agents.multi.multi_config import MultiConfig
from agents.multi.phase_env import PhaseVecEnv
from agents.multi.phase_networks import start_network
from agents.multi.team_reward import TeamReward, shared
from agents.policy.numpy_policy import NumpyPolicy
from biscale_env.core.errors import BiscaleError

CHAT = {"name": "chat", "profile": "gamma-sharegpt-like", "loads": [0.6]}
THREE = {"name": "conv", "profile": "azure-conv-like", "placement": "three-prefill-16"}


def small(**changes: Any) -> MultiConfig:
    given = {"scenarios": [CHAT, THREE], "episode_s": 1.0, "n_workloads": 4, "seed": 3}
    return MultiConfig.model_validate({**given, **changes})


@pytest.fixture(scope="module")
def clusters() -> ClusterRows:
    return ClusterRows(small())


def chosen(clusters: ClusterRows, rng: np.random.Generator) -> dict[str, Any]:
    return {
        phase: rng.uniform(-1, 1, len(rows.agents)).astype(np.float32)
        for phase, rows in clusters.rows.items()
    }


def test_rows_are_the_agents_of_the_environments(clusters: ClusterRows) -> None:
    """Clusters of different shape, stepped beside lone environments with the same actions."""
    names = [agent for _, agent in clusters.rows["prefill"].agents]
    assert names == ["prefill_0", "prefill_1", "prefill_0", "prefill_1", "prefill_2"]
    assert clusters.rows["decode"].cluster.tolist() == [0, 0, 1]
    clusters.reset(11)
    seeds = np.random.SeedSequence(11).generate_state(2)
    config, lone = clusters.config, []
    for scenario, env in zip(config.scenarios, clusters.envs, strict=True):
        options = {"rate_rps": env.options.source.rate_rps, "n_workloads": 4, "workload_seed": 3}
        lone.append(scenario.make_env(config.interval_s, config.episode_s, **options))
    seen = [env.reset(seed=int(s))[0] for env, s in zip(lone, seeds, strict=True)]
    rng = np.random.default_rng(0)
    for step in range(config.steps):
        actions = chosen(clusters, rng)
        outcomes, over = clusters.step(actions)
        of = [
            {
                agent: np.array([actions[phase][i]])
                for phase, rows in clusters.rows.items()
                for i, (k, agent) in enumerate(rows.agents)
                if k == number
            }
            for number in range(2)
        ]
        told = [env.step(mine) for env, mine in zip(lone, of, strict=True)]
        for phase, rows in clusters.rows.items():
            observed = clusters.observations(phase)
            for i, (k, agent) in enumerate(rows.agents):
                seen, reward, _, ends, infos = told[k]
                np.testing.assert_array_equal(observed[i], seen[agent])
                assert outcomes[phase].reward[i] == reward[agent]
                assert outcomes[phase].energy_j[i] == infos[agent]["energy_j"]
                assert outcomes[phase].tokens[i] == infos[agent]["tokens"]
                assert outcomes[phase].missed[i] == infos[agent]["cost"]
                assert over == ends[agent] == (step == config.steps - 1)
    assert sum(o.energy_j.sum() for o in outcomes.values()) > 0


def test_rows_see_and_act_as_a_policy_on_one_instance(clusters: ClusterRows) -> None:
    """The learner's features and actions are those of a checkpoint that is asked alone."""
    env = PhaseVecEnv(clusters, "prefill")
    network = start_network("shipped", "prefill")
    env.begin(5, {"decode": start_network("shipped", "decode")})
    features = env.reset()
    for _ in range(4):
        env.step_async(np.zeros((env.num_envs, 1), dtype=np.float32))
        features, *_ = env.step_wait()
    env._outputs = np.clip(network.forward(features)[:, 0], -1, 1)
    actions = env._actions("prefill")
    for i, k in enumerate(clusters.rows["prefill"].cluster):
        plant = clusters.envs[k].options.plant.plant("prefill", 4)
        alone = NumpyPolicy(network, plant, price=float(env.price["prefill"][k]))
        action, _ = alone.predict(clusters.observations("prefill")[i])
        assert action.item() == pytest.approx(float(actions[i]), abs=1e-6)


def test_an_episode_ends_for_all_rows_at_once(clusters: ClusterRows) -> None:
    env = PhaseVecEnv(clusters, "decode")
    env.begin(5, {"prefill": start_network("shipped", "prefill")})
    first = env.reset()
    prices = env.price["decode"].copy()
    for step in range(clusters.config.steps):
        env.step_async(np.zeros((env.num_envs, 1), dtype=np.float32))
        features, reward, done, infos = env.step_wait()
        assert np.isfinite(reward).all()
        assert done.tolist() == [step == clusters.config.steps - 1] * env.num_envs
    assert all(info["TimeLimit.truncated"] for info in infos)
    assert not np.array_equal(infos[0]["terminal_observation"], features[0])
    assert not np.array_equal(prices, env.price["decode"])
    env.begin(5, env.networks)
    np.testing.assert_array_equal(env.reset(), first)  # the same seed, the same episodes


def test_a_team_shares_within_its_cluster_only() -> None:
    own = np.array([1.0, 3.0, 10.0, 20.0, 60.0])
    cluster = np.array([0, 0, 1, 1, 1])
    np.testing.assert_allclose(shared(own, cluster, 0.0), own)
    np.testing.assert_allclose(shared(own, cluster, 1.0), [2, 2, 30, 30, 30])
    np.testing.assert_allclose(shared(own, cluster, 0.5), [1.5, 2.5, 20, 25, 45])


def test_a_miss_and_a_joule_cost_what_they_should(clusters: ClusterRows) -> None:
    """A miss costs price times the energy of a mean request at max clock, whoever missed it."""
    rows = clusters.rows["prefill"]
    n, nobody = len(rows.agents), np.zeros(len(rows.agents))
    late = (np.zeros(n, np.float32), np.zeros(n, np.float32))
    price = np.full(n, 40.0)

    def excess(energy_j: Any, missed: Any) -> Any:
        meter = TeamReward(clusters, "prefill")
        scale = rows.config.reward_scale
        made = meter(Outcome(nobody, energy_j, missed, nobody, nobody), late, price)
        spread = np.sqrt(meter.meter.shaper.spread.squares / meter.meter.shaper.spread.weight)
        cell = meter.meter.cells(rows.group, price)
        return np.asarray(made) * (spread[cell] + 1e-3) / scale

    missed = nobody.copy()
    missed[0] = 1.0
    cost = TeamReward(clusters, "prefill").meter.violation_weight(rows.group, price)
    lost = excess(nobody, nobody) - excess(nobody, missed)
    np.testing.assert_allclose(lost[:2], cost[0] / 2, rtol=1e-4)
    np.testing.assert_allclose(lost[2:], 0.0, atol=1e-4)
    ref_j = clusters.envs[1].options.plant.plant("prefill", 4).energy_ref_j
    joules = nobody.copy()
    joules[2:] = 5.0
    np.testing.assert_allclose(
        (excess(nobody, nobody) - excess(joules, nobody))[2:], 5 / ref_j, rtol=1e-4
    )


def test_mistakes_are_named() -> None:
    with pytest.raises(BiscaleError, match="hyper"):
        small(agents={"prefill": {"hyper": {"n_stps": 3}}}).agent("prefill")
    with pytest.raises(BiscaleError, match="for prefill, but decode"):
        start_network("agents/checkpoints/prefill.npz", "decode")
    with pytest.raises(ValueError, match="prefill and decode"):
        small(start={"prefil": "shipped"})
