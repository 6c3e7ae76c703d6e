"""What RL libraries do with an environment: probe keywords, vectorise, autoreset, copy, seed."""

import copy
import json
import pickle
from importlib.resources import files
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from slow_values import slow

import biscale_env  # noqa: F401  registers the environments
from biscale_env.config import load_slo
from biscale_env.core.errors import BiscaleError, OptionError
from biscale_env.envs.options import plain_options
from biscale_env.envs.vector import PhaseVectorEnv
from biscale_env.traces import generate

SMALL: dict[str, Any] = {"rate_rps": 4.0, "episode_s": 4.0, "n_workloads": 6}
IDS = ["BiScale/Prefill-v1", "BiScale/Decode-v1"]
DISCRETE = ["BiScale/PrefillDiscrete-v1", "BiScale/DecodeDiscrete-v1"]
MODES = list(AutoresetMode)


def named(value: Any) -> str:
    """A test id that is the same in every process."""
    return " ".join(repr(value).split()) if type(value) is not object else "object"


def same(one: Any, two: Any) -> None:
    """Infos alike in keys, masks, values and nesting."""
    if isinstance(one, dict):
        assert sorted(one) == sorted(two)
        for key in one:
            same(one[key], two[key])
    elif one is None:
        assert two is None
    elif isinstance(one, np.ndarray) and one.dtype == object:
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            same(a, b)
    else:
        np.testing.assert_allclose(one, two, rtol=1e-12)


# --- keywords -----------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", [*IDS, *DISCRETE])
def test_render_mode_none_is_accepted_everywhere(env_id: str) -> None:
    assert gym.make(env_id, render_mode=None, **SMALL).render_mode is None
    assert gym.make_vec(env_id, num_envs=2, render_mode=None, **SMALL).render_mode is None


@pytest.mark.filterwarnings("ignore:.*render_mode.*")
@pytest.mark.parametrize("keyword", [{"render_mode": "depth"}, {"frameskip": 4}, {"tpp": 4}])
@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_a_keyword_that_there_is_not_is_a_type_error_and_one_sentence(make, keyword) -> None:
    """SB3 and TorchRL go on without the keyword after a TypeError."""
    with pytest.raises(TypeError) as caught:
        make(IDS[0], **SMALL, **keyword)
    assert isinstance(caught.value, OptionError)
    assert isinstance(caught.value, BiscaleError)
    (name,) = keyword
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    if name != "render_mode":
        assert f"unexpected keyword argument '{name}'" in str(caught.value)


def test_the_nearest_option_is_named() -> None:
    with pytest.raises(OptionError, match="the nearest option is 'episode_s'"):
        gym.make(IDS[0], episodes_s=3.0)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", IDS)
def test_stable_baselines_makes_it_by_name(env_id: str) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_util import make_vec_env

    env = make_vec_env(env_id, n_envs=2, env_kwargs=SMALL)
    obs = env.reset()
    assert obs.shape[0] == 2
    assert env.step(np.zeros((2, 1), dtype=np.float32))[1].shape == (2,)
    model = sb3.PPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=1)
    model.learn(16)


@pytest.mark.slow
def test_stable_baselines_takes_the_id_itself() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.PPO("MlpPolicy", IDS[0], n_steps=8, batch_size=8, n_epochs=1)
    assert model.action_space.shape == (1,)


@pytest.mark.parametrize("env_id", IDS)
def test_max_episode_steps(env_id: str) -> None:
    single = gym.make(env_id, max_episode_steps=5, **SMALL)
    single.reset(seed=3)
    for k in range(1, 6):
        truncated = single.step([0.0])[3]
        assert truncated == (k == 5)
    vector = gym.make_vec(env_id, num_envs=2, max_episode_steps=5, **SMALL)
    vector.reset(seed=3)
    for k in range(1, 11):
        truncated = vector.step(np.zeros((2, 1)))[3]
        assert truncated.all() == (k % 5 == 0)
    with pytest.raises(BiscaleError, match="max_episode_steps"):
        gym.make_vec(env_id, max_episode_steps=0, **SMALL)


def test_a_trace_may_be_named_and_a_profile_is_one() -> None:
    named = gym.make(IDS[0], trace="azure-conv-like", rate_rps=4.0, episode_s=4.0)
    profile = gym.make(IDS[0], profile="azure-conv-like", rate_rps=4.0, episode_s=4.0)
    np.testing.assert_array_equal(named.reset(seed=1)[0], profile.reset(seed=1)[0])
    with pytest.raises(BiscaleError, match="there is no trace 'azure-conv-lik'"):
        gym.make(IDS[0], trace="azure-conv-lik", rate_rps=4.0)


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_the_spec_can_be_written_as_json_and_makes_the_same_again(make) -> None:
    slo = load_slo("biscale").model_copy(update={"ttft_s": 0.35, "name": "mine"})
    env = make(IDS[0], slo=slo, **SMALL)
    spec = json.loads(env.spec.to_json())
    assert spec["kwargs"]["slo"]["ttft_s"] == 0.35
    again = make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.plant.slo == slo


KINDS_OF_VALUES = {
    "slo by fields": {"slo": {"name": "own", "ttft_s": 0.5, "tpot_s": 0.1, "attainment": 0.99}},
    "a trace": {"trace": generate("azure-conv-like", rate_rps=4.0, duration_s=30.0, seed=1)},
    "a path": {"gpu": Path(str(files("biscale_env"))) / "no-such.yaml"},
    "numbers of NumPy": {"rate_rps": np.float32(4.0), "workload_seed": np.int64(3)},
}


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
@pytest.mark.parametrize("kind", [kind for kind in KINDS_OF_VALUES if kind != "a path"])
def test_a_spec_with_any_kind_of_value_is_json_and_makes_the_same_episode(make, kind) -> None:
    env = make(IDS[0], **SMALL | KINDS_OF_VALUES[kind])
    again = make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    np.testing.assert_array_equal(env.reset(seed=4)[0], again.reset(seed=4)[0])
    assert again.unwrapped.plant.slo == env.unwrapped.plant.slo


def test_a_path_in_a_spec_is_text() -> None:
    assert plain_options(KINDS_OF_VALUES["a path"])["gpu"].endswith("no-such.yaml")


@pytest.mark.parametrize(
    ("columns", "named"),
    [({"arrival_s": [0.0]}, "prompt_tokens"), ({"arival_s": [0.0]}, "arival_s")],
)
def test_columns_that_are_no_trace_are_one_sentence(columns, named) -> None:
    with pytest.raises(BiscaleError, match=named):
        gym.make(IDS[0], trace=columns, rate_rps=4.0)


# --- actions ------------------------------------------------------------------------------------

ACTIONS = [0.25, [0.25], np.float32(0.25), np.array(0.25), np.array([0.25]), np.array([[0.25]])]


@pytest.mark.parametrize("env_id", IDS)
def test_one_number_is_an_action_in_any_wrapping(env_id: str) -> None:
    seen = []
    for action in ACTIONS:
        env = gym.make(env_id, **SMALL)
        env.reset(seed=0)
        seen.append(env.unwrapped.step(action)[0])
    for obs in seen[1:]:
        np.testing.assert_array_equal(obs, seen[0])


WRONG = [[0.1, 0.2], [], "fast", None, {"a": 1}, float("nan"), np.array([np.nan]), np.zeros((2, 1)),
         1 + 2j, True, object()]  # fmt: skip


@pytest.mark.parametrize("action", WRONG, ids=named)
@pytest.mark.parametrize("env_id", [*IDS, *DISCRETE])
def test_what_is_no_action_is_one_sentence(env_id: str, action: Any) -> None:
    env = gym.make(env_id, **SMALL).unwrapped
    env.reset(seed=0)
    before = copy.deepcopy(env).step(0)[0]
    with pytest.raises(BiscaleError) as caught:
        env.step(action)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(env.step(0)[0], before)  # nothing has happened


@pytest.mark.parametrize("action", [7, -1, 2.0, np.array([1, 2])], ids=named)
def test_a_level_that_does_not_exist_is_one_sentence(action: Any) -> None:
    env = gym.make(DISCRETE[0], **SMALL).unwrapped
    env.reset(seed=0)
    with pytest.raises(BiscaleError, match="0 to 6"):
        env.step(action)


@pytest.mark.parametrize("level", [3, np.int64(3), np.array(3), np.array([3])], ids=named)
def test_levels_in_any_wrapping(level: Any) -> None:
    env, other = (gym.make(DISCRETE[0], **SMALL).unwrapped for _ in range(2))
    env.reset(seed=0)
    other.reset(seed=0)
    np.testing.assert_array_equal(env.step(level)[0], other.step(3)[0])


@pytest.mark.parametrize(
    "actions", [np.zeros(3), np.zeros((1, 2)), np.zeros((2, 2)), 0.0, ["a", "b"], [np.nan, 0.0]],
    ids=named,
)  # fmt: skip
def test_actions_of_a_wrong_shape_or_kind_for_the_vector(actions: Any) -> None:
    env = PhaseVectorEnv("prefill", 2, **SMALL)
    env.reset(seed=0)
    with pytest.raises(BiscaleError) as caught:
        env.step(actions)
    assert "\n" not in str(caught.value)


def test_an_action_that_is_not_a_number_is_named_by_its_environment() -> None:
    single = gym.make(IDS[0], **SMALL).unwrapped
    single.reset(seed=0)
    with pytest.raises(BiscaleError, match=r"^the action is not a number"):
        single.step(np.array([np.nan]))
    vector = PhaseVectorEnv("prefill", 3, **SMALL)
    vector.reset(seed=0)
    with pytest.raises(BiscaleError, match=r"^the action of environment 1 is not a number"):
        vector.step(np.array([0.0, np.nan, 0.0]))


# --- vector form --------------------------------------------------------------------------------


@pytest.mark.parametrize("kpis", [slow(False), True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("env_id", [*IDS, DISCRETE[1]])
def test_native_vector_is_the_sync_vector_of_gymnasium(
    env_id: str, mode: AutoresetMode, kpis: bool
) -> None:
    """Observations, rewards, ends, infos and masks, over several episodes, in each mode."""
    options = SMALL | {"ensemble_member": "random", "kpis": kpis}
    native = gym.make_vec(env_id, num_envs=3, autoreset_mode=mode, **options)
    sync = SyncVectorEnv([lambda: gym.make(env_id, **options)] * 3, autoreset_mode=mode)
    assert native.metadata["autoreset_mode"] is mode is native.unwrapped.autoreset_mode
    one, two = native.reset(seed=5), sync.reset(seed=5)
    np.testing.assert_array_equal(one[0], two[0])
    same(one[1], two[1])
    rng, ends = np.random.default_rng(1), 0
    high = 7 if env_id in DISCRETE else None
    for _ in range(700):
        acts = rng.integers(0, high, 3) if high else rng.uniform(-1, 1, (3, 1)).astype(np.float32)
        a, b = native.step(acts), sync.step(acts)
        for k in range(4):
            np.testing.assert_array_equal(a[k], b[k])
        same(a[4], b[4])
        ends += int(a[3].sum())
        if mode is AutoresetMode.DISABLED and a[3].any():
            with pytest.raises(BiscaleError, match="has ended"):
                native.step(acts)
            one = native.reset(options={"reset_mask": a[3].copy()})
            two = sync.reset(options={"reset_mask": a[3].copy()})
            np.testing.assert_array_equal(one[0], two[0])
            same(one[1], two[1])
        if ends > 8:
            break
    assert ends > 8


@pytest.mark.parametrize("mode", ["next_step", "NextStep", "DISABLED"])
def test_the_mode_may_be_given_by_name(mode: str) -> None:
    env = gym.make_vec(IDS[0], num_envs=2, autoreset_mode=mode, **SMALL)
    assert isinstance(env.metadata["autoreset_mode"], AutoresetMode)
    assert PhaseVectorEnv.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    json.loads(env.spec.to_json())


def test_a_mode_that_there_is_not() -> None:
    with pytest.raises(BiscaleError, match="SAME_STEP"):
        gym.make_vec(IDS[0], autoreset_mode="sometimes", **SMALL)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_vector_kwargs_of_the_other_vectorisations(kind: str) -> None:
    mode = AutoresetMode.NEXT_STEP
    env = gym.make_vec(
        IDS[0], num_envs=2, vectorization_mode=kind, vector_kwargs={"autoreset_mode": mode}, **SMALL
    )
    obs, _ = env.reset(seed=0)
    native = gym.make_vec(IDS[0], num_envs=2, autoreset_mode=mode, **SMALL)
    np.testing.assert_array_equal(obs, native.reset(seed=0)[0])
    env.close()


def test_reset_options_choose_the_episode_of_the_vector_as_of_the_single() -> None:
    single = gym.make(IDS[0], **SMALL)
    vector = gym.make_vec(IDS[0], num_envs=2, **SMALL)
    for options in ({"workload": 3}, {"workload": 3, "member": 2}):
        obs, info = single.reset(seed=0, options=options)
        many, infos = vector.reset(seed=0, options=options)
        np.testing.assert_array_equal(many, np.stack([obs, obs]))
        assert infos["workload"].tolist() == [info["workload"]] * 2
        assert infos["ensemble_member"].tolist() == [info["ensemble_member"]] * 2


@pytest.mark.parametrize(
    "options",
    [{"workloda": 3}, {"workload": -1}, {"workload": 1.5}, {"workload": "a"}, {"member": 10**6},
     {"workload": 10**6}, {"reset_mask": [True]}, {"reset_mask": np.zeros(2, dtype=bool)}],
    ids=named,
)  # fmt: skip
def test_reset_options_that_mean_nothing_are_refused_and_change_nothing(options) -> None:
    env = gym.make_vec(IDS[0], num_envs=2, **SMALL)
    env.reset(seed=0)
    before = env.unwrapped.batch.states.copy()
    with pytest.raises(BiscaleError) as caught:
        env.reset(options=options)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(env.unwrapped.batch.states, before)


@pytest.mark.parametrize("seed", [[1], [1, 2, 3], -1, [0, -2]], ids=named)
def test_seeds_that_do_not_fit(seed) -> None:
    with pytest.raises(BiscaleError, match="seed"):
        gym.make_vec(IDS[0], num_envs=2, **SMALL).reset(seed=seed)


def test_same_seed_same_episodes_with_the_default_number_of_workloads() -> None:
    single = gym.make(IDS[0], rate_rps=4.0, episode_s=4.0)
    vector = gym.make_vec(IDS[0], num_envs=3, rate_rps=4.0, episode_s=4.0)
    infos = vector.reset(seed=11)[1]
    for i in range(3):
        assert single.reset(seed=11 + i)[1]["workload"] == infos["workload"][i]


# --- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize("env_id", [*IDS, DISCRETE[0]])
def test_a_copy_goes_on_as_the_original_would(env_id: str, copied) -> None:
    env = gym.make(env_id, **SMALL)
    vector = gym.make_vec(env_id, num_envs=2, **SMALL)
    for original, actions in ((env, env.action_space), (vector, vector.action_space)):
        actions.seed(3)
        original.reset(seed=2)
        for _ in range(7):
            original.step(actions.sample())
        twin = copied(original)
        for _ in range(60):
            action = actions.sample()
            one, two = original.step(action), twin.step(action)
            np.testing.assert_array_equal(one[0], two[0])
            np.testing.assert_array_equal(one[1], two[1])
            if original is env and one[3]:
                np.testing.assert_array_equal(env.reset()[0], twin.reset()[0])


def test_a_workload_is_made_once_and_memory_is_bounded() -> None:
    from biscale_env.envs.batch import RequestTable
    from biscale_env.envs.loads.workload_tables import WorkloadTables
    from biscale_env.envs.plant import Plant, PlantSettings

    made: list[int] = []

    class Source:
        def workload(self, k: int):
            made.append(k)
            return generate("azure-conv-like", rate_rps=4.0, duration_s=10.0, seed=k)

    plant = Plant(PlantSettings.of("prefill"))
    size = len(RequestTable.of(plant, [Source().workload(0)]).arrival_s)
    tables = WorkloadTables(plant, Source(), kept_requests=3 * size)  # type: ignore[arg-type]
    made.clear()
    assert tables.of(0) is tables.of(0)
    assert made == [0]
    for k in range(10):
        tables.of(k)
    assert sum(len(t.arrival_s) for t in tables._kept.values()) <= 3 * size
    assert made == list(range(10))
    tables.of(9)
    tables.of(0)
    assert made == [*range(10), 0]


@pytest.mark.parametrize("env_id", [IDS[0], DISCRETE[1]])
def test_torchrl_makes_and_checks_it_by_name(env_id: str) -> None:
    gym_env = pytest.importorskip("torchrl.envs.libs.gym").GymEnv
    from torchrl.envs.utils import check_env_specs

    env = gym_env(env_id, **SMALL)
    check_env_specs(env)
    assert env.rollout(5)["next", "reward"].shape[0] == 5


@pytest.mark.parametrize("env_id", IDS)
def test_torchrl_rolls_the_vector_out(env_id: str) -> None:
    wrapper = pytest.importorskip("torchrl.envs.libs.gym").GymWrapper
    env = wrapper(gym.make_vec(env_id, num_envs=3, **SMALL))
    assert tuple(env.rollout(60, break_when_any_done=False).batch_size) == (3, 60)


def test_skrl_wraps_single_and_vector() -> None:
    wrap_env = pytest.importorskip("skrl.envs.wrappers.torch").wrap_env
    import torch

    for env in (gym.make(IDS[0], **SMALL), gym.make_vec(IDS[0], num_envs=3, **SMALL)):
        wrapped = wrap_env(env)
        wrapped.reset()
        reward = wrapped.step(torch.zeros((wrapped.num_envs, 1)))[1]
        assert reward.shape == (wrapped.num_envs, 1)


@pytest.mark.parametrize(
    "value", ["5x", [1], {}, object()], ids=["text", "list", "mapping", "object"]
)
@pytest.mark.parametrize(
    ("env_id", "names"),
    [
        ("BiScale/Prefill-v1", ("rate_rps", "load", "episode_s", "n_workloads", "profile")),
        (
            "BiScale/Cluster-v1",
            ("windows", "window_s", "episode_s", "freqs_mhz", "violation_weight", "n_workloads"),
        ),
    ],
    ids=["single", "cluster"],
)
def test_an_option_of_another_kind_is_one_sentence(
    env_id: str, names: tuple[str, ...], value: object
) -> None:
    for name in names:
        if name == "freqs_mhz" and value == [1]:
            continue  # a sequence, of a clock that the GPU does not have
        options = {name: value} if name == "load" else {"rate_rps": 4.0, name: value}
        with pytest.raises(BiscaleError, match=f"{name}|profile"):
            gym.make(env_id, **options)


@pytest.mark.parametrize("given", ["x", [("workload", 1)], 3])
def test_reset_options_that_are_no_mapping_are_one_sentence(given: object) -> None:
    for env in (gym.make(IDS[0], **SMALL), gym.make_vec(IDS[0], num_envs=2, **SMALL)):
        with pytest.raises(BiscaleError, match="mapping by name"):
            env.reset(options=given)


@pytest.mark.parametrize("env_id", [IDS[0], "BiScale/Cluster-v1"])
def test_a_limit_of_steps_that_is_no_number_is_one_sentence(env_id: str) -> None:
    with pytest.raises(BiscaleError, match="max_episode_steps must be a whole number"):
        gym.make_vec(env_id, num_envs=2, rate_rps=4.0, max_episode_steps="5x")


@pytest.mark.parametrize("env_id", IDS)
def test_scripts_of_version_0_1_find_the_plant(env_id: str) -> None:
    env: Any = gym.make(env_id, **SMALL).unwrapped
    assert env.world is env.plant
