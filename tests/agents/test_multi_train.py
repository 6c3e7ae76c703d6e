"""Parameter-shared training: starts from shipped networks, resumes exactly, drives a cluster."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_in_process import caller

pytest.importorskip("pettingzoo")
pytest.importorskip("stable_baselines3")

from agents.multi.multi_config import MultiConfig, load_multi_config
from agents.multi.multi_run import MultiRun, train_multi
from agents.multi.phase_networks import start_network
from agents.policy.numpy_policy import NumpyPolicy, load_network
from biscale_env.core.errors import BiscaleError

TINY: dict[str, Any] = {
    "scenarios": [{"name": "chat", "loads": [0.6]}],
    "episode_s": 2.0,
    "rounds": 2,
    "critic_rounds": 1,
    "start": {"prefill": "shipped", "decode": "shipped"},
    "agents": {
        phase: {"hyper": {"n_steps": 10, "batch_size": 20, "n_epochs": 1}}
        for phase in ("prefill", "decode")
    },
}


def tiny(**changes: Any) -> MultiConfig:
    return MultiConfig.model_validate({**TINY, **changes})


def weights_of(folder: Path, phase: str) -> list[Any]:
    network = load_network(folder / f"{phase}.npz")
    return [*network.weights, *network.biases]


def silent(line: str) -> None:
    assert "round" in line


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    train_multi(tiny(), tmp_path / "whole", False, silent)
    MultiRun(tiny(), tmp_path / "cut", False).round(silent)
    first = {p: weights_of(tmp_path / "cut", p) for p in ("prefill", "decode")}
    for phase in ("prefill", "decode"):  # the critic's own round leaves the actor as it was
        start = start_network("shipped", phase)
        for mine, other in zip(first[phase], [*start.weights, *start.biases], strict=True):
            np.testing.assert_array_equal(mine, other)
    train_multi(tiny(), tmp_path / "cut", True, silent)
    for phase in ("prefill", "decode"):
        whole, cut = weights_of(tmp_path / "whole", phase), weights_of(tmp_path / "cut", phase)
        for mine, other in zip(whole, cut, strict=True):
            np.testing.assert_array_equal(mine, other)
        assert any(not np.array_equal(a, b) for a, b in zip(first[phase], cut, strict=True))
    with pytest.raises(BiscaleError, match="'rounds' was 2"):
        train_multi(tiny(rounds=3), tmp_path / "cut", True, silent)
    with pytest.raises(BiscaleError, match="already"):
        train_multi(tiny(), tmp_path / "cut", False, silent)
    _drives_a_cluster(tmp_path / "cut")


def _drives_a_cluster(folder: Path) -> None:
    """The two files are ordinary checkpoints that control every instance of an environment."""
    env = tiny().scenarios[0].make_env(0.1, 1.0, rate_rps=20.0)
    seen, _ = env.reset(seed=1)
    policies = {}
    for agent in env.agents:
        phase = agent.partition("_")[0]
        plant = env.options.plant.plant(phase, env.tp_of(agent))
        policies[agent] = NumpyPolicy.load(folder / f"{phase}.npz", plant)
    spent = 0.0
    while env.agents:
        actions = {agent: policies[agent].predict(seen[agent])[0] for agent in env.agents}
        seen, _, _, _, infos = env.step(actions)
        spent += sum(info["energy_j"] for info in infos.values())
    assert spent > 0


def test_the_shipped_config_is_valid() -> None:
    config = load_multi_config(None)
    for phase in ("prefill", "decode"):
        agent = config.agent(phase)
        rows = agent.hyper["n_steps"]
        assert config.steps % rows == 0, "an episode is a whole number of rollouts"
        assert agent.price is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "5"], "takes no --steps"),
        (["--seeds", "2"], "takes no --seeds"),
        (["--resume"], "give it with --out"),
        (["--config", "nothing-like-it"], "nothing-like-it"),
    ],
)
def test_mistakes_on_the_command_line(
    options: list[str], words: str, capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    code, _, error = caller(capsys, monkeypatch, tmp_path, "train", "multi")(*options)
    assert code == 2
    assert words in error
