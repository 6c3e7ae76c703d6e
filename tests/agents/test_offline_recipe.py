"""Offline learners of TorchRL: a problem with a known answer, and the recipe from end to end.

TorchRL is the extra ``offline-rl``; without it these are skipped.
"""

import numpy as np
import pandas as pd
import pytest
import yaml
from cli_in_process import caller
from test_offline_parts import SMALL, made_up

pytest.importorskip("torchrl")
pytest.importorskip("minari")
import gymnasium as gym

from agents.offline.learners import learn
from agents.offline.offline_config import Learner
from agents.policy.numpy_policy import Network, load_network
from biscale_env.evaluation import evaluate

pytestmark = pytest.mark.slow
PRICE = (1.0, 4.0)


def bandit():
    """Random actions; what costs least is the action that the first feature says."""
    data = made_up(n=4000, groups=1)
    features = data.features.clip(-0.8, 0.8)
    energy = 1.0 + (data.action - features[:, 0]) ** 2
    changes = {"features": features, "following": features, "energy": energy.astype(np.float32)}
    return type(data)(**(vars(data) | changes | {"lost": 0 * data.lost}))


def outputs(layers, features, price):
    weights, biases = layers
    network = Network("prefill", "", "", "clock", 1.0, "tanh", weights, biases)
    columns = [] if price is None else [np.zeros((len(features), 1), dtype=np.float32)]
    return network.forward(np.concatenate([features, *columns], axis=1))[:, 0]


@pytest.mark.parametrize("kind", ["bc", "td3bc", "iql"])
def test_learners_beat_random_data_and_cloning_does_not(kind):
    data, price = bandit(), None if kind == "bc" else PRICE
    own = {"td3bc": {"alpha": 20.0}, "iql": {"temperature": 10.0, "expectile": 0.9}}.get(kind, {})
    learner = Learner(kind=kind, updates=700, batch_size=256, gamma=0.0, price=price, **own)
    said: list[str] = []
    got = outputs(learn(learner, data, (32, 32), 0, said.append), data.features, price)
    slope = np.polyfit(data.features[:, 0], got, 1)[0]
    wrong = np.mean((got - data.features[:, 0]) ** 2)
    assert "update 700" in said[-1]
    if kind == "bc":  # the mean of the data, whatever the features say
        assert abs(slope) < 0.25
        assert np.abs(got).mean() < 0.25
    else:
        assert slope > 0.5
        assert wrong < 0.5 * np.mean((data.action - data.features[:, 0]) ** 2)


def test_the_same_seed_gives_the_same_network():
    learner = Learner(kind="iql", updates=20, batch_size=32, price=PRICE)
    first, again, other = (learn(learner, bandit(), (8,), s, lambda t: None) for s in (0, 0, 1))
    np.testing.assert_array_equal(first[0][0], again[0][0])
    assert not np.array_equal(first[0][0], other[0][0])


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    return caller(capsys, monkeypatch, tmp_path, "offline")


LEARNERS = {
    "bc": {"kind": "bc", "updates": 200, "margins": [0.0, 0.3]},
    "td3bc": {"kind": "td3bc", "updates": 20, "price": [1, 100]},
    "iql": {"kind": "iql", "updates": 20, "price": [1, 100]},
}


def test_the_recipe_on_tiny_settings_and_what_it_leaves(call, tmp_path):
    """Data, networks that every command takes, scores; resumed, nothing is made again."""
    settings = SMALL | {"learners": LEARNERS, "data": ["mixed", "mpc"]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    code, out, err = call("prefill", "--config", "tiny.yaml", "--out", "run")
    assert code == 0, err
    run = tmp_path / "run"
    scores = pd.read_csv(run / "scores.csv")
    assert list(zip(scores["policy"], scores["data"], strict=True)) == [
        ("random", "-"), ("mpc", "-"),
        ("bc", "mixed"), ("bc", "mpc"), ("td3bc", "mixed"), ("td3bc", "mpc"),
        ("iql", "mixed"), ("iql", "mpc"),
    ]  # fmt: skip
    assert (scores["energy_ratio"] > 0.3).all()
    assert "bc on mixed" in out
    clone = load_network(run / "bc-mpc" / "best.npz")
    assert (clone.price, clone.card["algo"], list(clone.card["data"])) == (None, "bc", ["mpc"])
    assert 0.0 < clone.card["cpu_minutes"] < 10.0
    assert load_network(run / "iql-mixed" / "best.npz").price == pytest.approx(10.0)
    assert clone.trained_on["instances"][0].startswith("h100-sxm/llama-3.3-70b")
    env = gym.make("BiScale/Prefill-v1", rate_rps=2.0, episode_s=10.0)
    told = evaluate(str(run / "bc-mpc"), env, episodes=1)
    assert (told["energy_ratio"] < 1.0).all()

    before = (run / "bc-mpc" / "best.npz").read_bytes()
    (run / "iql-mpc" / "best.npz").unlink()
    code, out, err = call("prefill", "--config", "tiny.yaml", "--out", "run", "--resume")
    assert code == 0, err
    assert "iql on mpc" in out
    assert "bc on mpc" not in out
    assert "data set" not in out
    assert (run / "bc-mpc" / "best.npz").read_bytes() == before

    code, _, err = call("prefill", "--config", "tiny.yaml", "--out", "run")
    assert code == 2
    assert "holds an offline run already" in err
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings | {"episodes": 3}, sort_keys=False))
    code, _, err = call("prefill", "--config", "tiny.yaml", "--out", "run", "--resume")
    assert code == 2
    assert "'episodes' was 2 and is now 3; use the same config" in err
    code, _, err = call("prefill", "--out", "nothing", "--resume")
    assert code == 2
    assert "holds no offline run" in err
