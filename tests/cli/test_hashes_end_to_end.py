"""Commands that place, train and reproduce, on a trace whose prompts share blocks.

The rows are invented, in the form of Mooncake's.
"""

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from biscale_env.cli import build

LRU = "prefix cache: lru, the KV room of each prefill instance"


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Ten minutes of chats that grow by 512 tokens a turn."""
    rng = np.random.default_rng(4)
    rows, open_chats, made = [], {}, 0
    for t in np.cumsum(rng.exponential(120.0, 5000)).astype(int).tolist():
        chat = int(rng.integers(0, 400))
        ids = open_chats.get(chat, [])
        ids = [*ids, made] if len(ids) < 7 else [made]
        made, open_chats[chat] = made + 1, ids
        rows.append(
            {"timestamp": t, "input_length": 512 * len(ids), "output_length": 20, "hash_ids": ids}
        )
    path = tmp_path_factory.mktemp("trace") / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def told(monkeypatch, tmp_path):
    """Run a command that succeeds; gives what it printed."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path / "cache"))

    def run(*words):
        result = CliRunner().invoke(build(), [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return run


def joules(output):
    """J per output token of both placements."""
    row = next(line for line in output.splitlines() if "J per output token" in line)
    return [float(cell) for cell in row.replace("│", " ").split()[4:6]]


@pytest.mark.slow
def test_place(told, chats):
    asked = ("place", "--rate", "12", "--trace", chats, "--jobs", "1", "--window", "120")
    with_cache, without = told(*asked), told(*asked, "--prefix-cache", "off")
    assert LRU in with_cache
    assert "prefix cache: off\n" in without
    assert all(a < b for a, b in zip(joules(with_cache), joules(without), strict=True))


@pytest.mark.slow
def test_reproduce_paper(told, chats, tmp_path):
    config = tmp_path / "chats.yaml"
    config.write_text(
        "name: chats\nwindow_s: 60\ntables: workload\nseeds: 1\ntune_seeds: 1\nmembers: 0\n"
        "systems: [distserve]\nmember_systems: [distserve]\n"
        "points: [{name: B-50, workload: B, load: 0.5, lengths: own}]\noracle: [B-50]\n"
    )
    found = {}
    for rule in ("lru", "off"):
        out = tmp_path / rule
        output = told(
            "reproduce", "paper", "--config", config, "--trace", chats, "--out", out,
            "--jobs", "1", "--prefix-cache", rule,
        )  # fmt: skip
        assert (LRU if rule == "lru" else "prefix cache: off\n") in output
        assert (out / "paper.md").is_file()
        rows = pd.read_parquet(out / "paper" / "rows.parquet").set_index("system")
        # what hindsight needs for what DistServe's router sent is less than DistServe's own
        prefill = rows["prefill_j_per_token"]
        assert prefill["oracle-prefill"] < prefill["distserve"]
        found[rule] = float(rows["rate_rps"].iloc[0])
    assert found["lru"] > 1.1 * found["off"]  # the same share of a capacity that the cache raises


@pytest.mark.slow
def test_train(told, chats, tmp_path):
    pytest.importorskip("stable_baselines3")
    config = tmp_path / "train.yaml"
    config.write_text(
        "phase: prefill\nalgo: ppo\naction: rule\nn_envs: 8\ntotal_timesteps: 512\n"
        "net_arch: [16]\nhyper: {n_steps: 16, batch_size: 64, n_epochs: 1}\n"
        f"mixture: [{{trace: {chats}, loads: [0.5], workloads: 2, episode_s: 60}}]\n"
        "evaluation: {every_steps: 256, workloads: 1}\n"
    )
    output = told("train", "prefill", "--config", config, "--out", tmp_path / "run")
    assert LRU in output
    assert list((tmp_path / "run").glob("**/*.npz"))
