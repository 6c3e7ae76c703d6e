"""``biscale benchmark`` end to end on a suite of seconds: score, page, verification."""

import json

import pytest
from cli_in_process import caller

from biscale_env.evaluation.suite.score_card import read_card

SUITE = """
name: tiny
version: 1
base: {profile: azure-conv-like, duration_s: 40, load: 0.5, slo: biscale, delay_s: 0.05, seeds: 1}
oracle_seeds: {prefill: 1}
splits:
  in distribution:
    - {name: conversations, tiers: [prefill]}
    - {name: delay 200 ms, tiers: [prefill], changes: {delay_s: 0.2}}
"""
RULE = """
import numpy as np


class Low:
    phases = ("prefill",)

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        return np.full(len(observation), -1.0, dtype=np.float32), state
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "tiny.yaml").write_text(SUITE)
    (folder / "mine.py").write_text(RULE)
    return folder


@pytest.fixture
def call(capsys, monkeypatch, place):
    """Run the command in this process: (exit code, stdout, stderr)."""
    return caller(capsys, monkeypatch, place, "benchmark")


@pytest.mark.slow
def test_cards_are_written_and_verified(call, place):
    run = ("--suite", "tiny.yaml", "--jobs", "1", "--out", "run")
    code, out, err = call("max", "oracle", "low=mine.py:Low", *run)
    assert code == 0, err
    top, best, low = (read_card(place / f"run/{n}.json") for n in ("max", "oracle", "low"))
    assert [r.score for r in top.results] == [0.0, 0.0]
    for result in best.results:  # the plan that the bound brackets, without delay
        assert result.met
        assert 0.95 < result.score <= 1.0 + 1e-6
    assert not any(r.met for r in low.results)  # the lowest clock serves no TTFT
    assert low.of("prefill").score.estimate == 0.0
    assert low.of("prefill").missed == ("prefill/conversations", "prefill/delay 200 ms")
    assert "missed: prefill/conversations" in out
    assert (place / "run/score-cards.html").is_file()
    assert any("mine.py" in name for name in low.provenance["sha256"])

    code, out, err = call("verify", "run/low.json", *run[:4], "--tasks", "1", "--out", "again")
    assert code == 0, err
    assert "run/low.json holds" in out

    data = json.loads((place / "run/low.json").read_text())
    for result in data["results"]:
        result["energy_ratio"] += 0.05
    (place / "edited.json").write_text(json.dumps(data))
    code, _, err = call("verify", "edited.json", *run[:4], "--out", "edited")
    assert code == 2
    assert "edited.json does not hold" in err
    assert "energy_ratio is" in err


def test_mistakes_are_one_sentence(call):
    for arguments, words in (
        (("mpc", "--tier", "cluster"), "unknown coarse policy 'mpc'"),
        (("mine", "--tier", "clusters"), "cluster and multi are those of clusters"),
        (("mpc", "--suite", "cor"), "unknown suite 'cor'"),
        (("mpc", "--resume"), "--resume needs the run directory"),
        (("mpc", "--policy", "x"), "--policy is for biscale benchmark verify"),
        (("verify",), "needs a score card"),
        (("verify", "mine.py"), "not valid JSON"),
        (("verify", "nowhere.json"), "cannot read nowhere.json"),
        (("slack", "--tier", "prefill"), "policy 'slack' is for decode, not for prefill"),
        (("model.onnx",), "model.onnx"),
    ):
        code, _, err = call(*arguments)
        assert code == 2, arguments
        assert words in err
        assert "Traceback" not in err
