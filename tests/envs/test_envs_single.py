"""The Gymnasium environments: both checkers, seeds, spaces, infos, the discrete twin."""

import copy
import pickle
import random
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as some

import biscale_env  # noqa: F401 - registers the ids
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.registration import ENV_IDS
from biscale_env.envs.single import DecodeEnv, PhaseEnv, PrefillEnv

SMALL: dict[str, Any] = {"rate_rps": 4.0, "episode_s": 6.0}
PHASES = {"prefill": PrefillEnv, "decode": DecodeEnv}


def make(env_id: str, **options: Any) -> PhaseEnv:
    env = gym.make(env_id, **{**SMALL, **options}).unwrapped
    assert isinstance(env, PhaseEnv)
    return env


def path(
    env: gym.Env, actions: list[Any], seed: int | None = None, steps: int = 60
) -> list[np.ndarray]:
    """Observation, reward and time of every step from a reset on."""
    obs, _ = env.reset(seed=seed)
    rows = [obs]
    for k in range(steps):
        obs, reward, _, truncated, info = env.step(actions[k % len(actions)])
        rows.append(np.concatenate([obs, [reward, info["time_s"]]]))
        if truncated:
            break
    return rows


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


EPISODE = ("workload", "ensemble_member")
CHOSEN = [np.array([x], dtype=np.float32) for x in (0.9, -0.2, 0.4, -1.0)]


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_gymnasium_checker_without_a_warning(env_id: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(env_id), skip_render_check=True)


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_sb3_checker_without_a_warning(env_id: str) -> None:
    sb3 = pytest.importorskip("stable_baselines3.common.env_checker")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb3.check_env(make(env_id))


# the five seeding tests
@pytest.mark.parametrize("cls", PHASES.values())
@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_same_seed_same_path(cls: type[PhaseEnv], seed: int) -> None:
    one, two = cls(ensemble_member="random", **SMALL), cls(ensemble_member="random", **SMALL)
    two.reset(seed=5)  # another history must not matter
    assert same(path(one, CHOSEN, seed), path(two, CHOSEN, seed))


@pytest.mark.parametrize("cls", PHASES.values())
def test_other_seed_other_path(cls: type[PhaseEnv]) -> None:
    env = cls(**SMALL)
    assert not same(path(env, CHOSEN, 0), path(env, CHOSEN, 1))


@pytest.mark.parametrize("cls", PHASES.values())
def test_unseeded_resets_differ(cls: type[PhaseEnv]) -> None:
    env = cls(**SMALL)
    drawn = set()
    for _ in range(6):
        _, info = env.reset()
        drawn.add(info["workload"])
    assert len(drawn) > 1
    firsts = {PrefillEnv(**SMALL).reset()[1]["workload"] for _ in range(8)}
    assert len(firsts) > 1, "two fresh environments must not start alike"


@pytest.mark.parametrize("cls", PHASES.values())
def test_seeded_then_unseeded_repeats(cls: type[PhaseEnv]) -> None:
    def episodes(env: PhaseEnv) -> list[float]:
        return [env.reset(seed=3)[1]["workload"], *(env.reset()[1]["workload"] for _ in range(5))]

    one, two = episodes(cls(**SMALL)), episodes(cls(**SMALL))
    assert one == two
    assert len(set(one)) > 1


@pytest.mark.parametrize("cls", PHASES.values())
def test_global_random_state_is_untouched(cls: type[PhaseEnv]) -> None:
    np.random.seed(1)  # noqa: NPY002 - the global state is what is tested
    random.seed(1)
    before = (np.random.get_state()[1].copy(), random.getstate())  # type: ignore[index]  # noqa: NPY002
    env = cls(ensemble_member="random", **SMALL)
    path(env, CHOSEN, 3)
    env.reset()
    np.testing.assert_array_equal(before[0], np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
    assert before[1] == random.getstate()


def test_seed_is_independent_of_the_controller() -> None:
    """Workload k is the same whatever was done before: comparisons are paired."""
    slow, fast = PrefillEnv(**SMALL), PrefillEnv(**SMALL)
    path(slow, [np.array([-1.0], dtype=np.float32)], 4, steps=500)
    path(fast, [np.array([1.0], dtype=np.float32)], 4, steps=500)
    assert slow.reset()[1] == fast.reset()[1]
    np.testing.assert_array_equal(slow._batch.pool.arrival_s, fast._batch.pool.arrival_s)


@pytest.mark.parametrize("cls", PHASES.values())
def test_observations_are_fresh_arrays(cls: type[PhaseEnv]) -> None:
    env = cls(**SMALL)
    first, _ = env.reset(seed=0)
    kept = first.copy()
    second = env.step(CHOSEN[0])[0]
    third = env.step(CHOSEN[1])[0]
    np.testing.assert_array_equal(first, kept)
    assert not np.shares_memory(second, third)
    assert not np.shares_memory(second, env._batch.obs)


@pytest.mark.parametrize(("phase", "cls"), PHASES.items())
def test_info_and_reward(phase: str, cls: type[PhaseEnv]) -> None:
    """Plain floats, the same keys at reset and step; the reward follows from them."""
    env = cls(violation_weight=7.0, **SMALL)
    first = env.reset(seed=0)[1]
    cost_name = "cost_ttft" if phase == "prefill" else "cost_tpot"
    for k in range(200):
        obs, reward, terminated, truncated, info = env.step(CHOSEN[k % 4])
        kpis = info.pop("kpis", None)
        assert (kpis is not None) == truncated
        assert set(info) == {"time_s", "dt", "energy_j", "freq_mhz", "cost", cost_name, *EPISODE}
        assert set(first) == set(info)
        assert all(type(v) is float for v in info.values())
        assert type(reward) is float
        assert (type(terminated), terminated, type(truncated)) == (bool, False, bool)
        assert info["cost"] == info[cost_name] >= 0
        assert reward == pytest.approx(
            -info["energy_j"] / env.plant.energy_ref_j - 7.0 * info["cost"], rel=1e-12
        )
        assert 510 - 1e-6 <= info["freq_mhz"] <= 1980 + 1e-6
        assert env.observation_space.contains(obs)
        if truncated:
            return
    assert phase == "decode", "an episode of 6 s holds fewer than 200 prefill batches"


def test_energy_reference_is_the_stated_work() -> None:
    """One unit: a 1024-token prompt at max clock.

    And 128 output tokens of a batch of 32 at context 1024.
    """
    prefill, decode = PrefillEnv(**SMALL).plant, DecodeEnv(**SMALL).plant
    assert prefill.energy_ref_j == pytest.approx(
        float(prefill.model.energy_j(1024, 1024 * 512, 0, 1, 1980))
    )
    assert decode.energy_ref_j == pytest.approx(
        float(decode.model.energy_j(32, 0, 32 * 1024, 32, 1980)) * 4
    )


@pytest.mark.parametrize("cls", PHASES.values())
def test_episode_is_truncated_at_its_end(cls: type[PhaseEnv]) -> None:
    env = cls(**SMALL)
    for seed in range(3):
        env.reset(seed=seed)
        truncated, before_s, time_s = False, 0.0, 0.0
        while not truncated:
            before_s = time_s
            _, _, _, truncated, info = env.step(CHOSEN[0])
            time_s = info["time_s"]
        assert time_s >= 6.0 > before_s
        reward = env.step(CHOSEN[0])[1]
        assert reward == 0.0, "nothing is earned after the end"


def test_drain_serves_everything() -> None:
    env = PrefillEnv(drain=True, rate_rps=30.0, episode_s=3.0)  # far more than it can serve in time
    env.reset(seed=0)
    truncated = False
    while not truncated:
        truncated = env.step(CHOSEN[0])[3]
    assert env._batch.states[0]["finished"] == len(env._batch.pool.arrival_s)
    assert env._batch.states[0]["time_s"] > 3.0


@pytest.mark.parametrize("phase", PHASES)
def test_discrete_twin_is_the_continuous_one_at_its_levels(phase: str) -> None:
    name = phase.capitalize()
    twin, env = make(f"BiScale/{name}Discrete-v1"), make(f"BiScale/{name}-v1")
    levels = twin.plant.clocks.levels_mhz
    assert twin.action_space == gym.spaces.Discrete(len(levels))
    order = [int(k) for k in np.random.default_rng(0).integers(0, len(levels), 50)]
    actions = [env.plant.clocks.to_action([levels[k]]) for k in order]
    assert same(path(twin, order, 0), path(env, actions, 0))
    twin.reset(seed=0)
    for k, mhz in enumerate(levels):
        twin.step(k)
        assert twin._batch.states[0]["requested_ghz"] == pytest.approx(mhz / 1e3, abs=1e-9)


@pytest.mark.parametrize("level", [-1, 7, 100])
def test_a_level_that_does_not_exist_is_refused(level: int) -> None:
    twin = make("BiScale/PrefillDiscrete-v1")
    twin.reset(seed=0)
    with pytest.raises(BiscaleError, match="clock level"):
        twin.step(level)


@hypothesis(max_examples=25, deadline=None)
@given(
    some.integers(0, 50),
    some.lists(some.floats(allow_nan=False, width=32), min_size=1, max_size=10),
    some.sampled_from(sorted(PHASES)),
)
def test_observation_space_holds_for_any_action(seed: int, chosen: list[float], phase: str) -> None:
    """Infinities and values far outside [-1, 1] included; NaN is refused."""
    env = _shared(phase)
    env.reset(options={"workload": seed, "member": seed % 3})
    for k in range(30):
        obs, reward, _, truncated, _ = env.step(
            np.array([chosen[k % len(chosen)]], dtype=np.float32)
        )
        assert env.observation_space.contains(obs)
        assert np.isfinite(reward)
        if truncated:
            break


_made: dict[str, PhaseEnv] = {}


def _shared(phase: str) -> PhaseEnv:
    if phase not in _made:
        _made[phase] = PHASES[phase](**SMALL)
    return _made[phase]


@pytest.mark.parametrize("cls", PHASES.values())
def test_min_decision_interval(cls: type[PhaseEnv]) -> None:
    """Decisions stand for at least the interval (but for the last), and change nothing else at a
    constant clock.
    """
    top = np.array([1.0], dtype=np.float32)
    often, seldom = cls(**SMALL), cls(min_decision_interval_s=0.5, **SMALL)
    totals = []
    for env in (often, seldom):
        env.reset(seed=0)
        times, truncated, total = [float(env._batch.states[0]["time_s"])], False, 0.0
        while not truncated:
            _, reward, _, truncated, info = env.step(top)
            times.append(info["time_s"])
            total += reward
        totals.append((times[-1], total, float(env._batch.states[0]["energy_j"])))
    assert min(np.diff(times)[:-1]) >= 0.5
    np.testing.assert_allclose(totals[0], totals[1], rtol=1e-9)


def test_model_member_random_and_fixed() -> None:
    env = PrefillEnv(ensemble_member="random", **SMALL)
    drawn = {env.reset()[1]["ensemble_member"] for _ in range(12)}
    assert len(drawn) > 3
    assert all(0 <= d < env.plant.model.n_members for d in drawn)
    fixed = PrefillEnv(ensemble_member=2, **SMALL)
    assert {fixed.reset()[1]["ensemble_member"] for _ in range(3)} == {2.0}
    assert tuple(fixed._batch.coefs[0]) == tuple(fixed.plant.model.member(2))
    assert float(fixed._batch.params[0]["delay_s"]) == fixed.plant.model.delay_s(2)
    assert PrefillEnv(**SMALL).reset()[1]["ensemble_member"] == -1.0


def test_reset_options_choose_the_episode() -> None:
    env = DecodeEnv(**SMALL)
    _, info = env.reset(seed=0, options={"workload": 17, "member": 1})
    assert {name: info[name] for name in EPISODE} == {"workload": 17.0, "ensemble_member": 1.0}
    one = env._batch.pool.arrival_s.copy()
    env.reset(options={"workload": 17})
    np.testing.assert_array_equal(one, env._batch.pool.arrival_s)
    for bad in ({"workloads": 1}, {"workload": -1}, {"member": 10**6}):
        with pytest.raises(BiscaleError):
            env.reset(options=bad)


def test_step_before_reset_is_refused() -> None:
    with pytest.raises(BiscaleError, match="reset"):
        PrefillEnv(**SMALL).step(CHOSEN[0])


def test_engine_parameters_per_episode() -> None:
    """Training may change the engine per episode, but not beyond the memory that was set aside."""
    from biscale_env.envs.batch import Batch, RequestTable

    plant = DecodeEnv(max_seqs=4, **SMALL).plant
    env = DecodeEnv(max_seqs=4, **SMALL)
    batch = Batch(
        plant, 2, RequestTable.of(plant, [env.options.source.workload(k) for k in range(2)])
    )
    rows = np.arange(2)
    batch.reset(
        rows, rows, rows - 1, {"delay_s": np.array([0.0, 0.3]), "max_seqs": np.array([1, 2])}
    )
    assert batch.params["delay_s"].tolist() == [0.0, 0.3]
    assert batch.params["end_s"].tolist() == pytest.approx([6.0, 6.0])
    assert tuple(batch.coefs[1]) == tuple(plant.model.member(0))
    assert tuple(batch.coefs[0]) == tuple(plant.model.member(-1))
    largest = np.zeros(2)
    while not batch.done.all():
        batch.step(np.zeros(2, dtype=np.float32))
        largest = np.maximum(largest, batch.states["batch"])
    assert largest[0] <= 1
    assert largest[1] <= 2
    for bad in ({"max_seqs": np.array([5, 1])}, {"delay": np.zeros(2)}):
        with pytest.raises(BiscaleError):
            batch.reset(rows, rows, rows - 1, bad)


@pytest.mark.parametrize("cls", PHASES.values())
def test_environments_can_be_copied_and_sent_to_workers(cls: type[PhaseEnv]) -> None:
    """A pickled environment goes on from the same state, and its next episodes are the same."""
    env = cls(**SMALL)
    env.reset(seed=1)
    env.step(CHOSEN[0])
    for again in (lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy):
        twin = again(env)
        for action in CHOSEN:
            np.testing.assert_array_equal(env.step(action)[0], twin.step(action)[0])
        np.testing.assert_array_equal(env.reset(seed=4)[0], twin.reset(seed=4)[0])
