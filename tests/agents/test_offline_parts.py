"""Parts of offline learning that need no TorchRL: configs, recorded transitions, priced rewards."""

import json
import sys

import gymnasium as gym
import numpy as np
import pytest

from agents.offline.learners import need_torchrl
from agents.offline.offline_config import Learner, OfflineConfig, load_offline_config
from agents.offline.priced_reward import PricedReward
from agents.offline.recorded import dataset_id, groups_of, record_all
from agents.offline.transitions import RecordedDecisions, load_transitions
from agents.policy.features import FeatureMap, plants_of
from biscale_env.config.loader import validate
from biscale_env.core.errors import BiscaleError
from biscale_env.policies import resolve_policy

PARTS = [
    {"rates_rps": [2.0], "workloads": 1, "episode_s": 10.0},
    {"rates_rps": [12.0], "workloads": 1, "episode_s": 10.0, "llm": "llama-3.1-8b", "tp": 1},
]
SMALL = {
    "phase": "prefill",
    "parts": PARTS,
    "qualities": {"random": ["random"], "mpc": ["mpc:margin=0.1", "mpc:margin=0.3"]},
    "episodes": 2,
    "episode_s": 10.0,
    "learners": {"bc": {"kind": "bc", "updates": 20}},
    "evaluation": {"workloads": 1, "prices": 2},
}


def small(**changes) -> OfflineConfig:
    return validate({**SMALL, **changes}, OfflineConfig, "small")


# --- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_shipped_configs_need_no_trace(phase):
    config = load_offline_config(None, phase)
    parts = config.agent_config().mixture
    assert len(parts) > 5
    assert all(part.trace is None for part in parts)
    assert config.qualities_of("mixed") == tuple(config.qualities)
    assert {"bc", "iql"} <= set(config.learners)


def test_what_is_wrong_in_a_config_is_one_sentence():
    for wrong, told in (
        ({"learners": {"bc": {"kind": "bc", "price": [1, 10]}}}, "none to bc"),
        ({"learners": {"iql": {"kind": "iql"}}}, "give a price to td3bc and iql"),
        ({"data": ["expert"]}, "no data set 'expert'"),
        ({"qualities": {}}, "qualities"),
    ):
        with pytest.raises(BiscaleError, match=told):
            small(**wrong)
    with pytest.raises(BiscaleError, match="config decode is for decode, but prefill"):
        load_offline_config("decode", "prefill")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchrl", None)
    with pytest.raises(BiscaleError, match=r"install biscale-env\[offline-rl\]"):
        need_torchrl()


# --- data sets ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("minari")
    folder = tmp_path_factory.mktemp("offline")
    said: list[str] = []
    table = record_all(small(), folder, resolve_policy, said.append)
    return folder, table, said


def test_a_data_set_per_quality_and_group(run):
    folder, table, said = run
    assert len(said) == 4
    assert list(table["policy"]) == ["random"] * 2 + ["mpc:margin=0.1", "mpc:margin=0.3"] * 2
    assert table["episodes"].tolist() == [2, 2, 1, 1, 1, 1]
    assert all((folder / "data" / name).is_dir() for name in table["dataset"])
    assert dataset_id("prefill", "mpc", "azure-llama-3.1-8b-90") == (
        "biscale/prefill/mpc-azure-llama-3_1-8b-90-v1"
    )


def test_what_is_there_is_kept_and_what_was_broken_off_is_made_again(run):
    folder, table, _ = run
    path, said = folder / "datasets.csv", []
    whole = path.read_text()
    lost = table["dataset"].iloc[-1]  # its folder is there, its rows are not
    table[table["dataset"] != lost].to_csv(path, index=False)
    again = record_all(small(), folder, resolve_policy, said.append)
    assert len(said) == 1
    assert lost in said[0]
    assert path.read_text() == whole
    assert len(again) == len(table)


def test_transitions_are_what_was_recorded(run):
    """Against the environment itself, stepped with the same actions."""
    folder, _, _ = run
    data = load_transitions(small(), folder, ["mpc"])
    one = groups_of(small())[1]
    mine = np.flatnonzero(data.group == 1)
    env = gym.make("BiScale/Prefill-v1", **one.options)
    plant, at = env.unwrapped.plant, iter(mine)
    features, nominal = FeatureMap("prefill", plant.spec), plants_of(plant, "prefill", [-1])
    for seed in range(2):
        seen, _ = env.reset(seed=seed)
        policy = resolve_policy(("mpc:margin=0.1", "mpc:margin=0.3")[seed], plant)
        done = False
        while not done:
            k = next(at)
            action = policy.predict(seen)[0]
            before = features(seen[None], *nominal)
            seen, _, _, done, info = env.step(action)
            after = features(seen[None], *nominal)
            np.testing.assert_array_equal(data.features[k], before.features[0])
            np.testing.assert_array_equal(data.following[k], after.features[0])
            assert data.action[k] == pytest.approx(float(action[0]))
            assert data.energy[k] * plant.energy_ref_j == pytest.approx(info["energy_j"], rel=1e-4)
            assert data.elapsed_s[k] == pytest.approx(info["dt"], rel=1e-5)
            expected = info["cost"] + after.lost[0] - before.lost[0]
            assert data.lost[k] == pytest.approx(expected, abs=1e-5)
    assert next(at, None) is None
    assert (data.request_cost > 0).all()
    assert len(load_transitions(small(), folder, ["random", "mpc"])) > len(data)


# --- rewards at any price -----------------------------------------------------------------------


def made_up(n=400, groups=2, seed=0) -> RecordedDecisions:
    rng = np.random.default_rng(seed)
    group = np.sort(rng.integers(0, groups, n))
    features = rng.normal(size=(n, 3)).astype(np.float32)
    lost = (rng.uniform(size=n) < 0.1).astype(np.float32)
    return RecordedDecisions(
        features=features,
        following=rng.normal(size=(n, 3)).astype(np.float32),
        action=rng.uniform(-1, 1, n).astype(np.float32),
        energy=rng.uniform(1, 3, n).astype(np.float32),
        elapsed_s=rng.uniform(0.1, 0.5, n).astype(np.float32),
        lost=lost,
        group=group,
        source=2 * group + (np.arange(n) % 2),
        request_cost=np.array([1.0, 4.0])[:groups],
    )


@pytest.mark.parametrize("price", [1.0, 10.0, 100.0])
def test_the_cheapest_data_set_earns_nothing_on_average_and_the_others_less(price):
    """At a price of the grid: rewards are against the best average cost per second."""
    data = made_up()
    reward = PricedReward(data, (1.0, 100.0))
    got = reward(np.arange(len(data)), np.full(len(data), price))
    for g in range(2):
        rows = data.group == g
        assert np.sqrt(np.mean(got[rows] ** 2)) == pytest.approx(1.0, rel=1e-4)
        sums = [got[data.source == s].sum() for s in np.unique(data.source[rows])]
        assert max(sums) == pytest.approx(0.0, abs=1e-2)
        assert min(sums) < -1.0


def test_a_lost_request_costs_the_price_and_energy_one():
    data, price = made_up(), 10.0
    reward = PricedReward(data, (1.0, 100.0))
    rows = np.flatnonzero(data.group == 1)
    got = reward(rows, np.full(len(rows), price))
    columns = np.stack([data.elapsed_s, data.energy, data.lost], axis=1)[rows].astype(float)
    rate, energy, lost = np.linalg.lstsq(columns, got, rcond=None)[0]
    assert lost / energy == pytest.approx(price * 4.0, rel=1e-4)
    assert energy < 0 < rate


def test_prices_are_drawn_over_the_range():
    reward = PricedReward(made_up(), (1.0, 100.0))
    drawn = reward.draw(np.random.default_rng(0), 4000)
    assert drawn.min() >= 1.0
    assert drawn.max() <= 100.0
    assert np.median(drawn) == pytest.approx(10.0, rel=0.1)


def test_learners_are_plain_data():
    learner = Learner(kind="iql", price=(1, 10))
    assert Learner(**json.loads(learner.model_dump_json())) == learner
