"""The cluster environments as libraries use them.

Options, copies, vector forms, actions, masks, mistakes in one sentence.
"""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
from cluster_support import placement, trace
from gymnasium.vector import AutoresetMode

from biscale_env.config import load_slo
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_env import ClusterEnv
from biscale_env.envs.cluster.cluster_options import VIOLATION_WEIGHT, enumerate_placements
from biscale_env.envs.cluster.cluster_settings import ClusterSettings
from biscale_env.envs.cluster.parallel_env import ClusterParallelEnv
from biscale_env.envs.plant import PlantSettings
from biscale_env.traces import generate

SMALL = {"windows": 2, "window_s": 10.0, "rate_rps": 15.0, "freqs_mhz": (1200.0, 1980.0)}
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda env: pickle.loads(pickle.dumps(env))}


def make(**changes):
    return ClusterEnv(**{**SMALL, **changes})


def same_step(a, b):
    np.testing.assert_array_equal(a[0], b[0])
    assert a[1:] == b[1:]


# --- options


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, (12, 300.0)),
        ({"episode_s": 600.0}, (2, 300.0)),
        ({"episode_s": 120.0}, (1, 120.0)),
        ({"episode_s": 60.0, "window_s": 20.0}, (3, 20.0)),
        ({"windows": 3}, (3, 300.0)),
        ({"window_s": 30.0}, (12, 30.0)),
    ],
)
def test_the_length_of_an_episode(given, want):
    """Also by the name that the single-instance environments use."""
    env = gym.make("BiScale/Cluster-v1", rate_rps=20.0, **given).unwrapped
    assert (env.windows, env.window_s) == want
    assert env.options.source.episode_s == want[0] * want[1]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"episode_s": 500.0}, "500 s is not a whole number of windows of 300 s"),
        ({"episode_s": 10.0, "window_s": 20.0}, "not a whole number of windows"),
        ({"windows": 2, "episode_s": 600.0}, "either windows or episode_s"),
        ({"windows": 0}, "at least one window"),
        ({"window_s": 0.0}, "window_s must be a positive"),
        ({"episode_s": float("inf")}, "episode_s must be a positive"),
        ({"load": 0.5, "rate_rps": 3.0}, "either load or rate_rps"),
        ({"load": -1.0}, "load must be a positive"),
        ({"n_workloads": 0}, "n_workloads must be at least 1"),
        ({"violation_weight": -1.0}, "violation_weight must be"),
        ({"render_mode": "depth"}, "render_mode"),
        ({"tp": 4}, "'tp': the placement gives"),
        ({"max_seqs": 4}, "prefill_max_seqs or decode_max_seqs"),
        ({"min_decision_interval_s": 0.1}, "min_decision_interval_s"),
        ({"drain": True}, "'drain'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*render_mode.*")
def test_impossible_options_are_one_sentence(given, match):
    with pytest.raises(BiscaleError, match=match) as caught:
        gym.make("BiScale/Cluster-v1", **given)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*render_mode.*")
@pytest.mark.parametrize("name", ["frameskip", "epsiode_s", "render_mode", "routr"])
def test_an_unknown_keyword_is_a_type_error_and_one_sentence(name):
    """Stable-Baselines3 and TorchRL try keywords and go on without them after a TypeError."""
    for make_it in (lambda **kw: gym.make("BiScale/Cluster-v1", **kw), ClusterParallelEnv):
        with pytest.raises(TypeError, match=name) as caught:
            make_it(**{name: "depth"})
        assert isinstance(caught.value, BiscaleError)
        if name == "frameskip":
            assert "unexpected keyword argument 'frameskip'" in str(caught.value)
        if name == "epsiode_s":
            assert "nearest option is 'episode_s'" in str(caught.value)


def test_render_mode_none_is_accepted():
    assert gym.make("BiScale/Cluster-v1", render_mode=None, **SMALL).render_mode is None


def test_an_slo_may_be_an_object():
    slo = load_slo("biscale").model_copy(update={"name": "mine", "ttft_s": 0.123})
    env = make(slo=slo)
    obs, _ = env.reset(seed=0)
    assert obs[-2] == pytest.approx(0.123)
    assert ClusterParallelEnv(slo=slo, rate_rps=5.0).options.plant.slo.ttft_s == 0.123


def test_the_violation_weight_is_that_of_the_single_instances():
    assert PlantSettings.of("prefill").violation_weight == VIOLATION_WEIGHT
    rewards = []
    for weight in (0.0, 10.0):
        env = make(slo="mlperf-interactive", rate_rps=60.0, violation_weight=weight)
        env.reset(seed=0)
        _, reward, _, _, info = env.step(0)
        rewards.append(reward)
    assert info["cost"] > 0
    expected = 60.0 * 10.0
    assert rewards[0] - rewards[1] == pytest.approx(10.0 * info["cost"] / expected)


def test_load_is_a_fraction_of_what_is_served_at_best():
    env = make(rate_rps=None, load=0.5)
    best = max(env.options.capacities.goodput_rps(p) for p in env.placements)
    assert env.options.source.rate_rps == pytest.approx(0.5 * best)
    agents = ClusterParallelEnv(load=0.5)
    served = agents.options.capacities.goodput_rps(agents.placement)
    assert agents.options.source.rate_rps == pytest.approx(0.5 * served)
    assert served <= best * 1.1


# --- copies


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("steps", [None, 0, 1])
def test_a_copy_goes_on_as_the_original(how, steps):
    """Before the first reset, after it, and amid an episode; and into the next episode."""
    env = make()
    if steps is not None:
        env.reset(seed=3)
        for action in range(steps):
            env.step(action)
    twin = COPIES[how](env)
    if steps is None:
        np.testing.assert_array_equal(env.reset(seed=3)[0], twin.reset(seed=3)[0])
    for action in (5, 9)[steps or 0 :]:
        same_step(env.step(action), twin.step(action))
    np.testing.assert_array_equal(env.reset()[0], twin.reset()[0])
    same_step(env.step(2), twin.step(2))


def test_a_copy_is_independent():
    env = make()
    env.reset(seed=3)
    twin = copy.deepcopy(env)
    twin.step(0)
    other = make()
    other.reset(seed=3)
    same_step(env.step(7), other.step(7))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_the_parallel_env_goes_on_as_the_original(how):
    env = ClusterParallelEnv(episode_s=2.0, rate_rps=20.0)
    env.reset(seed=1)
    low = {agent: np.array([-0.5], dtype=np.float32) for agent in env.agents}
    env.step(low)
    twin = COPIES[how](env)
    while env.agents:
        a, b = env.step(low), twin.step(low)
        for agent in a[0]:
            np.testing.assert_array_equal(a[0][agent], b[0][agent])
        assert a[1:] == b[1:]
    assert twin.agents == []


# --- vector forms


@pytest.mark.parametrize("autoreset", list(AutoresetMode))
@pytest.mark.parametrize("mode", [None, "sync"])
def test_a_vector_form_runs_its_sub_environments(mode, autoreset):
    """Sub-environment i, seeded with seed + i, is the single environment with that seed."""
    how = {"autoreset_mode": autoreset}
    made = gym.make_vec(
        "BiScale/Cluster-v1",
        num_envs=2,
        vectorization_mode=mode,
        **({"vector_kwargs": how} if mode else how),
        **SMALL,
    )
    assert made.metadata["autoreset_mode"] is made.autoreset_mode is autoreset
    obs, _ = made.reset(seed=5)
    singles = [make(), make()]
    for i, single in enumerate(singles):
        np.testing.assert_array_equal(single.reset(seed=5 + i)[0], obs[i])
    for action in (1, 4):
        obs, rewards, _, over, infos = made.step(np.array([action, action + 2]))
        steps = [env.step(action + 2 * i) for i, env in enumerate(singles)]
        np.testing.assert_array_equal(rewards, [step[1] for step in steps])
        np.testing.assert_array_equal(over, [step[3] for step in steps])
    last = infos["final_obs"] if autoreset is AutoresetMode.SAME_STEP else obs
    for i, step in enumerate(steps):
        np.testing.assert_array_equal(last[i], step[0])
    if autoreset is AutoresetMode.SAME_STEP:
        np.testing.assert_array_equal(
            infos["final_info"]["energy_j"], [s[4]["energy_j"] for s in steps]
        )
    assert [len(mask) for mask in made.call("action_masks")] == [len(singles[0].placements)] * 2
    made.close()


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_the_vector_form_goes_on_as_the_original(how):
    env = gym.make_vec("BiScale/Cluster-v1", num_envs=2, **SMALL)
    env.reset(seed=4)
    env.step(np.array([3, 1]))
    twin = COPIES[how](env)
    for actions in ([2, 8], [0, 5]):
        a, b = env.step(np.array(actions)), twin.step(np.array(actions))
        for x, y in zip(a[:4], b[:4], strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_vector_form_truncates_and_names_its_mode():
    env = gym.make_vec(
        "BiScale/Cluster-v1", num_envs=2, max_episode_steps=1, autoreset_mode="next_step", **SMALL
    )
    assert env.autoreset_mode is AutoresetMode.NEXT_STEP
    env.reset(seed=4)
    assert env.step(np.array([3, 1]))[3].all()
    assert not env.step(np.array([3, 1]))[3].any()
    assert env.spec.to_json()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"num_envs": 0}, "num_envs"),
        ({"max_episode_steps": 0}, "max_episode_steps"),
        ({"autoreset_mode": "later"}, "autoreset_mode 'later'"),
        ({"frameskip": 3}, "unexpected keyword argument 'frameskip'"),
    ],
)
def test_mistakes_with_the_vector_form_are_one_sentence(given, match):
    with pytest.raises(BiscaleError, match=match) as caught:
        gym.make_vec("BiScale/Cluster-v1", **{**SMALL, **given})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_vector_form_with_processes():
    made = gym.make_vec("BiScale/Cluster-v1", num_envs=2, vectorization_mode="async", **SMALL)
    obs, _ = made.reset(seed=5)
    np.testing.assert_array_equal(make().reset(seed=6)[0], obs[1])
    assert made.step(np.array([1, 2]))[1].shape == (2,)
    made.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*render_mode.*")
def test_stable_baselines_makes_it_by_name():
    pytest.importorskip("stable_baselines3")
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    env = make_vec_env("BiScale/Cluster-v1", n_envs=2, env_kwargs=SMALL)
    model = PPO("MlpPolicy", env, n_steps=4, batch_size=4, n_epochs=1)
    model.learn(8)
    assert env.reset().shape == (2, len(make().reset(seed=0)[0]))


# --- actions and reset options


@pytest.mark.parametrize("action", [3, np.int64(3), np.array(3), np.array([3], dtype=np.int32)])
def test_one_whole_number_is_an_action_in_any_wrapping(action):
    a, b = make(), make()
    a.reset(seed=0)
    b.reset(seed=0)
    same_step(a.step(action), b.step(3))


@pytest.mark.parametrize(
    "action", [1.0, "a", None, [1, 2], [], np.zeros((2, 1), int), {}, True, float("nan"), -1, 9999]
)
def test_what_is_no_placement_is_one_sentence(action):
    env = make()
    env.reset(seed=0)
    with pytest.raises(BiscaleError) as caught:
        env.step(action)
    assert "\n" not in str(caught.value)
    assert "placement" in str(caught.value)
    assert env.step(0)[4]["time_s"] == 10.0  # nothing had happened


@pytest.mark.parametrize(
    "actions",
    [
        {"x": 0.0},
        {"prefill_0": np.nan},
        {"prefill_0": [1, 2]},
        {"decode_0": "u"},
        {"decode_0": None},
    ],
)
def test_what_is_no_action_of_an_agent_is_one_sentence(actions):
    env = ClusterParallelEnv(episode_s=2.0, rate_rps=20.0)
    env.reset(seed=1)
    with pytest.raises(BiscaleError, match=r"agent|action of") as caught:
        env.step(actions)
    assert "\n" not in str(caught.value)
    assert env.cluster.time_s == 0.0


@pytest.mark.parametrize("workload", ["x", 1.5, -1, [1], None])
def test_a_workload_is_a_whole_number(workload):
    for env in (make(), ClusterParallelEnv(rate_rps=5.0)):
        with pytest.raises(BiscaleError, match="workload"):
            env.reset(options={"workload": workload})


@pytest.mark.parametrize("workload", [3, np.int64(3), np.array(3)])
def test_a_chosen_workload(workload):
    env = make()
    _, info = env.reset(options={"workload": workload})
    assert info["workload"] == 3.0
    np.testing.assert_array_equal(
        env._pieces[0].arrival_s, make().options.source.workload(3).window(0, 10).arrival_s
    )


# --- masks


def test_the_mask_follows_the_load_without_being_given_capacities():
    env = make(rate_rps=40.0, windows=3)
    env.reset(seed=0)
    assert env.action_masks().all()  # nothing is known before the first window
    env.step(len(env.placements) - 1)
    allowed = env.action_masks()
    assert 0 < allowed.sum() < len(allowed)
    rate = env._rates[1]
    of = env.options.capacities
    for p, good in zip(env.placements, allowed, strict=True):
        counts = {g.phase: g.count * of.capacity_rps(g.phase, g.tp, g.freq_mhz) for g in p.groups}
        assert good == (min(counts.values()) >= rate)


def test_the_mask_predicts_who_meets_the_slo():
    """The placement with the least predicted goodput misses it, the one with the most meets it."""
    env = make(rate_rps=25.0, window_s=60.0)
    of = env.options.capacities
    goodput = np.array([of.goodput_rps(p) for p in env.placements])
    assert goodput.min() < 25.0 < goodput.max()

    def fraction_missed(index):
        env.reset(options={"workload": 2})
        return sum(env.step(int(index))[4]["cost"] for _ in range(2)) / (25.0 * 120.0)

    assert fraction_missed(goodput.argmin()) > 0.05
    assert fraction_missed(goodput.argmax()) < 0.01


def test_with_too_much_load_the_mask_keeps_the_best():
    env = make(rate_rps=300.0)
    env.reset(seed=0)
    env.step(0)
    allowed = env.action_masks()
    goodput = np.array([env.options.capacities.goodput_rps(p) for p in env.placements])
    np.testing.assert_array_equal(allowed, goodput == goodput.max())


def test_capacities_of_a_trace_come_from_the_trace():
    longer = generate("azure-conv-like", rate_rps=4.0, duration_s=900.0, seed=3)
    env = make(trace=longer, rate_rps=4.0)
    piece = env.options.capacities.sample
    assert len(piece) >= 100
    np.testing.assert_array_equal(piece.arrival_s, longer.window(0.0, piece.duration_s).arrival_s)
    short = ClusterEnv(windows=1, window_s=2.0, trace=trace(np.arange(40) * 0.1, 100, 9), load=None)
    short.reset(seed=0)
    with pytest.raises(BiscaleError, match="needs at least 100"):
        short.action_masks()


def test_enumeration_follows_the_settings():
    found = enumerate_placements(ClusterSettings.of(gpus=8), (1200.0,))
    assert [p.label() for p in found] == ["P 1 x TP4 @ 1200; D 1 x TP4 @ 1200"]


# --- many agents


def test_infos_of_reset_and_step_have_the_same_keys():
    env = ClusterParallelEnv(episode_s=1.0, rate_rps=20.0)
    _, first = env.reset(seed=0)
    _, _, _, _, then = env.step({a: np.zeros(1, np.float32) for a in env.agents})
    for agent in env.possible_agents:
        assert first[agent].keys() == then[agent].keys()
        assert all(type(v) is float for v in (*first[agent].values(), *then[agent].values()))
        assert first[agent]["workload"] == then[agent]["workload"]


def test_an_agent_without_an_action_keeps_its_clock():
    env = ClusterParallelEnv(episode_s=2.0, rate_rps=20.0, actuation_delay_s=0.0)
    env.reset(seed=1)
    env.step(dict.fromkeys(env.agents, -1.0))
    env.step({"prefill_0": 1.0})
    clocks = env.cluster.prefills.meta["base_ghz"]
    assert clocks == pytest.approx([1.98, 0.51])


def test_a_colocated_placement_has_no_agents():
    from cluster_support import colocated

    with pytest.raises(BiscaleError, match="co-located"):
        ClusterParallelEnv(colocated())


# --- instances that enter service late


def test_arrival_rates_of_an_instance_that_starts_late_count_its_own_time():
    """An instance in service for 10 s has seen 10 s, however long the cluster has run."""
    from cluster_support import plant

    from biscale_env.contract import DECODE_SPEC, PREFILL_SPEC
    from biscale_env.envs.cluster.engine import Cluster
    from biscale_env.envs.cluster.instance_observer import ClusterObserver

    cluster = Cluster(plant(prefill_router="round_robin", decode_router="round_robin"), placement())
    steady = trace(np.arange(1000) * 0.1 + 0.05, 200, 2, duration_s=100.0)
    cluster.offer(steady)
    cluster.advance(100.0)
    cluster.place(placement((4, 4), (4, 4)))
    cluster.offer(trace(np.arange(100) * 0.1 + 0.05, 200, 2, duration_s=10.0))
    cluster.advance(110.0)
    observer = ClusterObserver(cluster)
    for instance, spec in ((1, PREFILL_SPEC), (3, DECODE_SPEC)):
        _, obs = observer.observe(instance)
        for window in ("1s", "10s", "60s"):
            k = spec.index(f"arrival_rate_{window}")
            assert obs[k] * spec.scale[k] == pytest.approx(5.0, rel=0.25), (spec.name, window)


def test_the_spec_can_be_written_as_json_and_makes_the_same_again():
    slo = load_slo("biscale").model_copy(update={"ttft_s": 0.35, "name": "mine"})
    env = gym.make("BiScale/Cluster-v1", slo=slo, **SMALL)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.plant.slo == slo
    np.testing.assert_array_equal(env.reset(seed=1)[0], again.reset(seed=1)[0])


def test_a_trace_may_be_named_and_a_profile_is_one():
    named, profile = make(trace="azure-conv-like"), make(profile="azure-conv-like")
    named.reset(seed=1)
    profile.reset(seed=1)
    np.testing.assert_array_equal(named.step(3)[0], profile.step(3)[0])
    with pytest.raises(BiscaleError, match="no trace 'azure-conv-lik'"):
        make(trace="azure-conv-lik")
