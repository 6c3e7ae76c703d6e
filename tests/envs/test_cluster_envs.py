"""The coarse loop and the many-agent form as environments.

API checks, seeds, reward parts, masks, mistakes.
"""

import gymnasium as gym
import numpy as np
import pytest
from cluster_support import placement, trace
from gymnasium.utils.env_checker import check_env

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_env import FEATURES
from biscale_env.envs.cluster.cluster_options import enumerate_placements
from biscale_env.envs.cluster.cluster_settings import ClusterSettings
from controllers.placement.capacity_table import TableRequest, capacity_table

SMALL = {"windows": 3, "window_s": 20.0, "rate_rps": 15.0, "freqs_mhz": (1200.0, 1980.0)}


def make(**changes):
    return gym.make("BiScale/Cluster-v1", **{**SMALL, **changes}).unwrapped


@pytest.mark.filterwarnings("error")
def test_gymnasium_check():
    check_env(make(), skip_render_check=True)


@pytest.mark.filterwarnings("error")
def test_sb3_check():
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(make())


def rollout(env, actions, **reset):
    obs, _ = env.reset(**reset)
    path = [obs]
    rewards = []
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        path.append(obs)
        rewards.append(reward)
        assert not terminated
    assert truncated
    return np.array(path), rewards, info


def test_seeds():
    env = make()
    first, again = rollout(env, [0, 5, 9], seed=3), rollout(env, [0, 5, 9], seed=3)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1]
    other = rollout(env, [0, 5, 9], seed=4)
    assert first[1] != other[1]
    unseeded = rollout(env, [0, 5, 9])
    assert unseeded[1] != other[1]


def test_reward_is_energy_and_violations():
    env = make(slo="mlperf-interactive", rate_rps=40.0)
    env.reset(seed=0)
    for _ in range(3):
        _, reward, _, _, info = env.step(0)
        expected = 40.0 * 20.0
        assert reward == pytest.approx(
            -info["energy_j"] / (env.energy_ref_j * expected) - 30 * info["cost"] / expected
        )
        assert info["cost"] == info["cost_ttft"] + info["cost_tpot"]
        assert all(type(v) is float for name, v in info.items() if name != "kpis")
    assert info["cost"] > 0


def test_slower_placement_uses_less_power():
    """The same workload: fewer, slower instances cost less; observations say what was chosen."""
    env = make()
    _, largest, _ = rollout(env, [len(env.placements) - 1] * 3, options={"workload": 1})
    path, smallest, _ = rollout(env, [0] * 3, options={"workload": 1})
    assert sum(smallest) > sum(largest)
    names = [f[0] for f in FEATURES]
    assert path[-1][names.index("prefill_freq")] * 1980 == pytest.approx(
        env.placements[0].groups[0].freq_mhz
    )
    assert path[-1][names.index("arrival_rate")] * 30 == pytest.approx(15.0, rel=0.5)


def test_masks_follow_the_capacities():
    env = make()
    env.reset(seed=0)
    assert env.action_masks().all()
    trace = env.options.source.workload(0)
    table = capacity_table(
        TableRequest(ClusterSettings.of(), (1200.0, 1980.0)), trace, use_cache=False
    )
    capacities = {(e.phase, e.tp, e.freq_mhz): e.rate_rps for e in table.entries}
    masked = make(capacities_rps=capacities, rate_rps=35.0)
    masked.reset(seed=0)
    assert masked.action_masks().all()
    masked.step(0)
    allowed = masked.action_masks()
    assert 0 < allowed.sum() < len(allowed)
    for p in np.array(masked.placements, dtype=object)[allowed][:5]:
        assert min(g.count * capacities[g.phase, g.tp, g.freq_mhz] for g in p.groups) > 25.0


def test_the_ilp_stands_beside_a_learned_policy():
    env = make()
    env.reset(seed=0)
    mixed = placement((4,), (4, 8), freq_mhz=1200.0)
    obs, reward, _, _, _ = env.step_placement(mixed)
    assert env.observation_space.contains(obs)
    assert reward < 0


def test_enumeration_is_complete():
    found = enumerate_placements(ClusterSettings.of(gpus=12), (1200.0,))
    shapes = {tuple((g.tp, g.count) for g in p.groups) for p in found}
    want = {
        ((a, n), (b, m))
        for a in (4, 8)
        for b in (4, 8)
        for n in range(1, 4)
        for m in range(1, 4)
        if a * n + b * m <= 12
    }
    assert shapes == want
    assert len(found) == len(want)


def test_parallel_env_passes_pettingzoo():
    from pettingzoo.test import parallel_api_test, parallel_seed_test

    from biscale_env.envs.cluster.parallel_env import ClusterParallelEnv

    def fresh(render_mode=None):
        return ClusterParallelEnv(episode_s=2.0, rate_rps=20.0, render_mode=render_mode)

    parallel_api_test(fresh(), num_cycles=60)
    parallel_seed_test(fresh, num_cycles=30)


def test_parallel_agents_have_their_own_energy_and_clock():
    from biscale_env.envs.cluster.parallel_env import ClusterParallelEnv

    env = ClusterParallelEnv(episode_s=5.0, rate_rps=20.0, actuation_delay_s=0.0)
    env.reset(seed=1)
    assert env.agents == ["prefill_0", "prefill_1", "decode_0", "decode_1"]
    before = env.cluster.energies()
    low = {a: np.array([-1.0 if a.endswith("0") else 1.0], dtype=np.float32) for a in env.agents}
    spent = dict.fromkeys(env.agents, 0.0)
    while env.agents:
        _, _, _, _, infos = env.step(low)
        for agent, info in infos.items():
            spent[agent] += info["energy_j"]
    assert spent["decode_0"] < spent["decode_1"]
    total = env.cluster.energies().since(before)
    assert spent["prefill_0"] + spent["prefill_1"] == pytest.approx(total.prefill_j)
    assert spent["decode_0"] + spent["decode_1"] == pytest.approx(total.decode_j)
    assert env.cluster.prefills.states["freq_ghz"][0] == pytest.approx(0.51)
    with pytest.raises(BiscaleError, match="call reset"):
        env.step(low)


def test_policies_of_single_instances_run_in_the_cluster():
    """The compiled slack and EcoFreq rules and the observation-based policies give the same run."""
    from cluster_support import plant, random_trace

    from biscale_env.envs.cluster.whole_run import run_cluster
    from controllers.base import context_of
    from controllers.registry import make_policy

    t = random_trace(200, rate_rps=10.0, seed=2)
    pairs = {"slack": "static", "ecofreq": "ecofreq"}
    for decode, prefill in pairs.items():
        compiled = run_cluster(
            plant(
                prefill_policy=prefill, decode_policy=decode, decode_margin=0.8, prefill_margin=0.3
            ),
            placement(),
            t,
        )
        w = plant(
            prefill_policy="external" if prefill != "static" else "static",
            decode_policy="external",
            prefill_margin=0.3,
        )
        policies = {}
        for phase, margin in (("decode", 0.8), ("prefill", 0.3)):
            name = decode if phase == "decode" else "ecofreq"
            policies[phase] = make_policy(name, context_of(w.plant(phase, 4)), margin=margin)
        asked = run_cluster(w, placement(), t, policies=policies)
        np.testing.assert_allclose(
            asked.requests["finish_s"], compiled.requests["finish_s"], rtol=1e-4
        )
        careless = run_cluster(
            plant(prefill_policy=prefill, decode_policy=decode, prefill_margin=0.3), placement(), t
        )
        assert np.median(compiled.tpot_s) < 0.9 * np.median(careless.tpot_s)  # the margin binds
        assert asked.energy.decode_j == pytest.approx(compiled.energy.decode_j, rel=2e-3)
        assert (
            len(
                {
                    round(x, 3)
                    for x in (
                        compiled.energy.decode_j,
                        run_cluster(plant(), placement(), t).energy.decode_j,
                    )
                }
            )
            == 2
        )


def test_mistakes_are_sentences():
    with pytest.raises(BiscaleError, match="call reset"):
        make().step(0)
    env = make()
    env.reset(seed=0)
    with pytest.raises(BiscaleError, match="placement 9999 does not exist"):
        env.step(9999)
    with pytest.raises(BiscaleError, match="unknown reset option"):
        env.reset(options={"speed": 1})
    with pytest.raises(BiscaleError, match="unexpected keyword argument 'routr'"):
        make(routr="x")
    with pytest.raises(BiscaleError, match="7 GPUs cannot be divided"):
        make(gpus=7)
    with pytest.raises(BiscaleError, match="no prefill and decode instance fit together on 4 GPUs"):
        make(gpus=4)
    with pytest.raises(BiscaleError, match="at least one window"):
        make(windows=0)


def test_compiled_mpc_is_near_the_published_search():
    """The compiled prefill MPC and the observation-based greedy search differ only in which
    deadlines count as lost and within margins.
    """
    from cluster_support import plant, random_trace

    from biscale_env.envs.cluster.whole_run import run_cluster
    from controllers.base import context_of
    from controllers.registry import make_policy

    t = random_trace(400, rate_rps=9.0, seed=8, prompt_max=2000, output_max=3)
    compiled = run_cluster(plant(prefill_policy="mpc", prefill_margin=0.2), placement(), t)
    w = plant(prefill_policy="external")
    policy = make_policy("mpc-greedy", context_of(w.plant("prefill", 4)), margin=0.2, give_up=True)
    asked = run_cluster(w, placement(), t, policies={"prefill": policy})
    fastest = run_cluster(plant(), placement(), t)
    assert asked.energy.prefill_j == pytest.approx(compiled.energy.prefill_j, rel=0.03)
    assert max(asked.energy.prefill_j, compiled.energy.prefill_j) < 0.9 * fastest.energy.prefill_j
    assert abs(asked.attainment("prefill") - compiled.attainment("prefill")) < 0.02


@pytest.mark.parametrize(("dtype", "tp"), [("bf16", 4), ("fp8", 2), ("fp8", 8)])
def test_mpc_rests_at_the_clock_of_least_energy(dtype, tp):
    """A lone prompt with time to spare runs at the level of least energy, also where the highest
    levels lie above the power cap.
    """
    from cluster_support import plant

    from biscale_env.envs.cluster.engine import Cluster
    from controllers.prefill.mpc_greedy import greedy_all

    w = plant(dtype=dtype, prefill_policy="mpc", slo="mlperf-server")
    model, levels = w.plant("prefill", tp).model, w.plant("prefill", tp).clocks.levels_mhz
    for prompt in range(64, 2049, 124):
        load = (prompt, prompt**2 / 2, 0, 1)
        joules, spans = (
            np.array([float(of(*load, f)) for f in levels])
            for of in (model.energy_j, model.latency_s)
        )
        cluster = Cluster(w, placement((tp,), (tp,)))
        cluster.offer(trace([0.0], prompt, 2))
        cluster.advance()
        assert cluster.prefills.states["freq_ghz"][0] * 1e3 == pytest.approx(
            levels[joules.argmin()]
        )
        level = np.zeros((1, 1), dtype=np.int64)
        greedy_all(spans[None, None], joules[None, None], np.full((1, 1), 2.0), level)
        assert level[0, 0] == joules.argmin()
