"""Data sets for offline learning: Minari opens them, names and mixtures, what is refused."""

import numpy as np
import pytest
from cli_in_process import caller

from agents import load_agent
from agents.training.dataset import export_dataset
from biscale_env.core.errors import BiscaleError
from biscale_env.policies.checkpoint_source import SHIPPED

minari = pytest.importorskip("minari")
SMALL = {"episode_s": 10.0, "rate_rps": 2.0, "n_workloads": 4}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    return tmp_path / "sets"


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    return caller(capsys, monkeypatch, tmp_path, "export", "minari")


@pytest.mark.parametrize(("phase", "own"), [("prefill", "mpc:margin=0.2"), ("decode", "slack")])
def test_a_mixture_opens_in_minari_and_makes_its_environment_again(phase, own):
    recorded = export_dataset(phase, ["random", own, "agent"], "biscale/mixed-v0", 6, **SMALL)
    data = minari.load_dataset("biscale/mixed-v0")
    assert (data.total_episodes, data.total_steps) == (6, recorded.steps)
    table = recorded.summary()
    assert list(table.index) == ["random", own, "agent"]
    assert (table["episodes"] == 2).all()
    assert (table["energy_ratio"] > 0).all()
    env = data.recover_environment()
    agent = load_agent(SHIPPED / f"{phase}.npz", env.unwrapped.plant)
    for episode, told in zip(data, recorded.episodes.to_dict("records"), strict=True):
        assert len(episode.rewards) == told["steps"]
        assert episode.rewards.sum() == pytest.approx(told["reward"])
        assert set(episode.infos) == {"dt", "cost"}
        assert episode.infos["dt"].shape == (told["steps"] + 1,)
        assert (episode.infos["dt"][1:] > 0).all()
        assert list(episode.truncations) == [False] * (told["steps"] - 1) + [True]
        seen, _ = env.reset(seed=int(episode.id))  # every step comes out again
        for k, action in enumerate(episode.actions):
            np.testing.assert_array_equal(seen, episode.observations[k])
            if told["policy"] == "agent":
                np.testing.assert_array_equal(action, agent.predict(seen)[0])
            seen, reward, _, _, info = env.step(action)
            assert reward == pytest.approx(episode.rewards[k])
            assert info["cost"] == episode.infos["cost"][k + 1]
    low, high = (data.storage.metadata[f"ref_{end}_score"] for end in ("min", "max"))
    assert low == pytest.approx(table.loc["random", "mean_return"])
    assert high == pytest.approx(table["mean_return"].max())
    assert f"{own}: 2 episodes" in data.storage.metadata["description"]


def test_names_that_do_not_fit_leave_nothing_behind(folder):
    for name in ("prefill mpc", "biscale/mpc", "mpc"):
        with pytest.raises(BiscaleError, match="is no name of a Minari data set"):
            export_dataset("prefill", "max", name, 1, **SMALL)
    with pytest.raises(BiscaleError, match="1 episodes cannot hold 2 policies"):
        export_dataset("prefill", ["max", "random"], "biscale/mixed-v0", 1, **SMALL)
    assert not list(folder.rglob("*")) if folder.exists() else True
    export_dataset("prefill", "max", "biscale/max-v0", 1, **SMALL)
    with pytest.raises(BiscaleError, match="'biscale/max-v0' is there already"):
        export_dataset("prefill", "max", "biscale/max-v0", 1, **SMALL)


def test_the_command_prints_size_and_scores(call, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n\nclass Low:\n    def predict(self, observation, state=None,"
        " episode_start=None, deterministic=True):\n        return np.array([-1.0]), state\n"
    )
    short = ("--episodes", "2", "--episode-s", "5")
    code, out, err = call("decode", "biscale/d-v1", "--policies", "own,low=mine.py:Low", *short)
    assert code == 0, err
    assert "mean_return" in out
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["slack", "low"]
    assert minari.load_dataset("biscale/d-v1").total_episodes == 2
    code, _, err = call("decod", "biscale/e-v1")
    assert code == 2
    assert "unknown phase 'decod'" in err
