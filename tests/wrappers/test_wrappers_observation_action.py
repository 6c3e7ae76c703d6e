"""Named, compact and remembered observations; other forms of action."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import biscale_env  # noqa: F401 - registers the ids
from biscale_env.core.errors import BiscaleError
from biscale_env.wrappers import (
    CompactObservation,
    CompactVectorObservation,
    DeltaAction,
    DictObservation,
    History,
    LevelAction,
    MhzAction,
    NamedObservation,
    ObservationPart,
    PowerCapAction,
)
from biscale_env.wrappers.compact_observation import compact_parts
from biscale_env.wrappers.last_step import requested_mhz
from biscale_env.wrappers.observation_parts import NamedParts, documented_parts

IDS = ["BiScale/Prefill-v1", "BiScale/Decode-v1"]
SMALL: dict[str, Any] = {"rate_rps": 6.0, "episode_s": 6.0}


def make(env_id: str = IDS[0], **options: Any) -> gym.Env:
    return gym.make(env_id, **SMALL | options)


def collected(env: gym.Env, steps: int = 200) -> list[Any]:
    env.action_space.seed(2)
    seen = [env.reset(seed=0)[0]]
    for _ in range(steps):
        observation, *_, truncated, _ = env.step(env.action_space.sample())
        seen.append(observation)
        if truncated:
            seen.append(env.reset()[0])
    return seen


WRAPPED = {
    "dict": DictObservation,
    "compact": CompactObservation,
    "compact dict": lambda env: CompactObservation(env, as_dict=True),
    "history": History,
    "history of compact": lambda env: History(CompactObservation(env), steps=3),
    "mhz": MhzAction,
    "levels": LevelAction,
    "two levels": lambda env: LevelAction(env, (1005.0, 1980.0)),
    "delta": DeltaAction,
    "moves": lambda env: DeltaAction(env, moves_mhz=(-150, 0, 150)),
    "cap": PowerCapAction,
    "history of levels": lambda env: History(LevelAction(env), steps=2),
}


@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version.*")
@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("env_id", IDS)
def test_gymnasium_checks_every_wrapper(env_id: str, name: str) -> None:
    env = WRAPPED[name](make(env_id))
    check_env(env, skip_render_check=True)
    for observation in collected(env, 60):
        assert env.observation_space.contains(observation)


@pytest.mark.parametrize("env_id", IDS)
def test_the_dictionary_is_the_vector(env_id: str) -> None:
    plain, named = make(env_id), DictObservation(make(env_id))
    parts = documented_parts(plain.unwrapped.plant.spec)
    assert [part.size for part in parts].count(8) == (6 if env_id == IDS[0] else 0)
    for one, two in zip(collected(plain, 60), collected(named, 60), strict=True):
        np.testing.assert_array_equal(one, np.concatenate([two[part.name] for part in parts]))


@pytest.mark.parametrize("env_id", IDS)
def test_twenty_numbers_of_about_one(env_id: str) -> None:
    seen = np.array(collected(CompactObservation(gym.make(env_id)), 1500))
    assert seen.shape[1] == 20
    assert np.isfinite(seen).all()
    assert np.abs(seen).max() < 8
    assert (seen.std(axis=0) > 1e-3).sum() >= 14


def test_the_tightest_deadline_and_the_work_before_it() -> None:
    """By hand: of three batches the second is the tightest that can be met."""
    plant = make().unwrapped.plant
    spec = plant.spec
    physical = np.zeros(spec.dim)
    for name, values in {
        "batch_tokens": [2048, 1024, 512],
        "batch_slack": [-0.5, 0.2, 0.7],
        "batch_slack_alive": [0.6, 0.2, 0.7],
    }.items():
        at = spec.index(name)
        physical[at : at + 8] = 10.0 if "slack" in name else 0.0
        physical[at : at + 3] = values
    made = NamedParts(compact_parts("prefill"), plant, as_dict=True)(spec.encode(physical))
    assert made["least_slack"] == pytest.approx(0.2)
    assert made["batch_slack"] == pytest.approx(-0.5)
    assert made["tokens_until"] == pytest.approx(np.log1p(1.5))


@pytest.mark.slow
@pytest.mark.parametrize("env_id", IDS)
def test_the_vector_form_is_the_single_one_final_observations_too(env_id: str) -> None:
    native = gym.make_vec(env_id, num_envs=3, **SMALL)
    sync = gym.vector.SyncVectorEnv(
        [lambda: CompactObservation(make(env_id))] * 3,
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )
    vector = CompactVectorObservation(native)
    one, two = vector.reset(seed=1)[0], sync.reset(seed=1)[0]
    np.testing.assert_allclose(one, two, rtol=1e-6)
    rng, ended = np.random.default_rng(0), 0
    while ended < 4:
        actions = rng.uniform(-1, 1, (3, 1)).astype(np.float32)
        a, b = vector.step(actions), sync.step(actions)
        np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
        assert vector.observation_space.contains(a[0])
        for i in np.flatnonzero(a[3]):
            np.testing.assert_allclose(a[4]["final_obs"][i], b[4]["final_obs"][i], rtol=1e-6)
            ended += 1


def test_a_part_of_ones_own() -> None:
    part = ObservationPart(
        "busy", "requests, 0 or 1", lambda s: s.value("queue_requests") > 0, 0, 1
    )
    pair = ObservationPart("pair", "two", lambda s: s.horizon("batch_tokens")[..., :2], size=2)
    env = NamedObservation(make(), [part, pair])
    assert env.observation_space.shape == (3,)
    observation, _ = env.reset(seed=0)
    assert observation[0] == 1.0


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([], "different names"),
        ([ObservationPart("a", "", lambda s: 0.0)] * 2, "different names"),
    ],
)
def test_parts_that_make_no_observation(parts, says) -> None:
    with pytest.raises(BiscaleError, match=says):
        NamedObservation(make(), parts)
    wrong = ObservationPart("slow", "", lambda s: np.zeros(3))
    with pytest.raises(BiscaleError, match="'slow' has shape"):
        NamedObservation(make(), [wrong]).reset()
    with pytest.raises(BiscaleError, match="before other wrappers"):
        CompactObservation(CompactObservation(make()))


def test_history_keeps_what_was_seen_done_and_waited() -> None:
    plain, env = make(IDS[1]), History(make(IDS[1]), steps=3)
    dim = plain.observation_space.shape[0]
    first = plain.reset(seed=0)[0]
    stacked = env.reset(seed=0)[0].reshape(3, dim + 2)
    for block in stacked:
        np.testing.assert_array_equal(block, [*first, 0, 0])
    told = []
    for action in (0.1, -3.0, 0.7):
        observation, *_, info = plain.step(np.array([action], dtype=np.float32))
        told.append([*observation, max(action, -1.0), info["dt"]])
        stacked = env.step(np.array([action], dtype=np.float32))[0].reshape(3, dim + 2)
    np.testing.assert_allclose(stacked, told[::-1], rtol=1e-6)


def test_history_of_choices() -> None:
    env = History(LevelAction(make(), (1005.0, 1395.0, 1980.0)), steps=1)
    env.reset(seed=0)
    np.testing.assert_array_equal(env.step(1)[0][-4:-1], [0, 1, 0])


def test_clocks_in_mhz_levels_and_changes_ask_for_the_same() -> None:
    asked = []
    for env, action in (
        (MhzAction(make()), [1395.0]),
        (LevelAction(make(), (1005.0, 1395.0)), 1),
        (DeltaAction(make(), most_mhz=1170.0), [-0.5]),
        (DeltaAction(make(), moves_mhz=(0.0, -585.0)), 1),
    ):
        env.reset(seed=0)
        asked.append((env.step(action)[0], requested_mhz(env.unwrapped)))
    for observation, mhz in asked:
        assert mhz == pytest.approx(1395.0)
        np.testing.assert_array_equal(observation, asked[0][0])


def test_changes_add_up_and_stay_within_the_range() -> None:
    env = DeltaAction(make(IDS[1]), most_mhz=450.0)
    env.reset(seed=0)
    seen = []
    for action in (-1.0, -1.0, 1 / 3, -1.0, -1.0):
        env.step(np.array([action]))
        seen.append(requested_mhz(env.unwrapped))
    assert seen == pytest.approx([1530, 1080, 1230, 780, 510])


@pytest.mark.parametrize(
    ("wrap", "action"),
    [
        (MhzAction, np.nan), (MhzAction, [1.0, 2.0]), (LevelAction, 7), (LevelAction, 0.5),
        (DeltaAction, np.nan), (PowerCapAction, [np.nan]), (PowerCapAction, "much"),
        (lambda env: DeltaAction(env, moves_mhz=(0, 1)), 2),
    ],
)  # fmt: skip
def test_what_is_no_action_is_one_sentence(wrap: Any, action: Any) -> None:
    env = wrap(make())
    env.reset(seed=0)
    with pytest.raises(BiscaleError):
        env.step(action)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: LevelAction(env, (1.0,)),
        lambda env: DeltaAction(env, most_mhz=0.0),
        lambda env: DeltaAction(env, moves_mhz=()),
        lambda env: PowerCapAction(env, low_w=900.0),
        lambda env: MhzAction(LevelAction(env)),
    ],
)
def test_wrappers_that_cannot_be(wrap: Any) -> None:
    with pytest.raises(BiscaleError):
        wrap(make())


def test_a_power_cap_keeps_the_power_and_is_forgotten_at_reset() -> None:
    env = PowerCapAction(make(IDS[1], rate_rps=12.0), low_w=250.0)
    own = env.high_w
    freqs = {}
    for share in (1.0, 0.0, -1.0):
        env.reset(seed=0)
        assert env.unwrapped.batch.coefs["p_cap_w"][0] == own
        cap_w = 250.0 + 0.5 * (share + 1) * (own - 250.0)
        for _ in range(40):
            *_, info = env.step(np.array([share]))
            st = env.unwrapped.batch.states[0]
            assert st["last_power_w"] <= cap_w * (1 + 1e-6) or info["freq_mhz"] < 511
        freqs[share] = info["freq_mhz"]
    assert freqs[1.0] > freqs[-1.0]
    assert freqs[1.0] >= freqs[0.0] >= freqs[-1.0]
