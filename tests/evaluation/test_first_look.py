"""`evaluate`: whole episodes of any environment, the same requests for every policy."""

import gymnasium as gym
import numpy as np
import pytest

import biscale_env  # noqa: F401 - registers the ids
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation import evaluate
from biscale_env.wrappers import CompactObservation, MhzAction


@pytest.fixture(scope="module")
def env():
    return gym.make("BiScale/Decode-v1", episode_s=8.0, rate_rps=6.0, n_workloads=4)


def test_max_clock_is_its_own_reference(env):
    found = evaluate("max", env, episodes=3)
    assert len(found) == 3
    assert found["energy_ratio"].to_numpy() == pytest.approx(1.0, rel=1e-9)
    assert (found["tpot_p99_s"] > 0).all()


def test_policies_meet_the_same_requests_and_a_seed_repeats(env):
    fast, slow = evaluate("max", env, episodes=3), evaluate("static:810", env, episodes=3)
    arrived = [f["requests_finished"] + f["requests_unfinished"] for f in (fast, slow)]
    # a slow last iteration may end after a further arrival
    np.testing.assert_allclose(arrived[0], arrived[1], atol=2)
    assert (slow["energy_per_token_j"] < fast["energy_per_token_j"]).all()
    again = evaluate("max", env, episodes=3)
    assert again.equals(fast)
    other = evaluate("max", env, episodes=3, seed=11)
    assert not other.equals(fast)


def test_figures_are_those_of_a_loop_by_hand(env):
    found = evaluate("static:1200", env, episodes=1, seed=3)
    plant = env.unwrapped.plant
    action = np.asarray(plant.clocks.to_action([1200.0]), dtype=np.float32)
    _, info = env.reset(seed=3)
    over, energy_j = False, info["energy_j"]  # it idles until the first request
    while not over:
        _, _, terminated, truncated, info = env.step(action)
        over, energy_j = terminated or truncated, energy_j + info["energy_j"]
    assert found.iloc[0].to_dict() == pytest.approx(info["kpis"])
    assert found["energy_j"].iloc[0] == pytest.approx(energy_j)


def test_an_object_is_asked_as_stable_baselines_would_and_may_keep_a_state():
    calls = []

    class Counting:
        def predict(self, observation, state=None, episode_start=None, deterministic=True):
            calls.append((state, bool(episode_start[0]), deterministic))
            return np.array([900.0], dtype=np.float32), (0 if state is None else state + 1)

    env = MhzAction(gym.make("BiScale/Decode-v1", episode_s=4.0, rate_rps=4.0))
    found = evaluate(Counting(), env, episodes=2)
    starts = [k for k, call in enumerate(calls) if call[1]]
    assert len(starts) == 2
    assert starts[0] == 0
    assert [calls[k][0] for k in starts] == [None, None]
    assert calls[1][0] == 0
    assert all(call[2] for call in calls)
    assert (found["energy_ratio"] < 1).all()


def test_an_episode_that_a_wrapper_cuts_off_has_figures_too(env):
    cut = gym.wrappers.TimeLimit(env, 5)
    assert (evaluate("max", cut, episodes=2)["duration_s"] < 8.0).all()


def test_an_id_does():
    assert len(evaluate("max", "BiScale/PrefillInterval-v1", episodes=1)) == 1


@pytest.mark.parametrize(
    ("policy", "make", "said"),
    [
        ("max", lambda: gym.make("BiScale/DecodeDiscrete-v1"), "action in \\[-1, 1\\]"),
        ("max", lambda: CompactObservation(gym.make("BiScale/Decode-v1")), "needs the observation"),
        ("max", lambda: gym.make("CartPole-v1"), "controls one instance, CartPole-v1 has none"),
        ("maxx", lambda: gym.make("BiScale/Decode-v1"), "did you mean 'max'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(policy, make, said):
    with pytest.raises(BiscaleError, match=said):
        evaluate(policy, make())


def test_no_episodes_and_no_figures_are_said():
    class Still:
        def predict(self, observation, state=None, episode_start=None, deterministic=True):
            return 0, state

    with pytest.raises(BiscaleError, match="episodes must be at least 1"):
        evaluate("max", "BiScale/Decode-v1", episodes=0)
    with pytest.raises(BiscaleError, match="tells no key figures"):
        evaluate(Still(), gym.make("CartPole-v1"))
