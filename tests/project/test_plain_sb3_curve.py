"""The guide's curve of plain Stable-Baselines3: what it weighs, what its best static clock is."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from docs_modules import docs_module

DOCS = Path(__file__).resolve().parents[2] / "docs"
ENV = "BiScale/Prefill-v1"


@pytest.fixture(scope="module")
def plain():
    with docs_module("plain_sb3") as module:
        yield module


def frame(plain, *rows):
    return pd.DataFrame(rows, columns=list(plain.COLUMNS))


def test_attainment_counts_requests_and_energy_counts_episodes(plain):
    rows = frame(
        plain,
        (ENV, "ppo", 0, 100, 0, 0.6, 1.0, 300),
        (ENV, "ppo", 0, 100, 1, 0.8, 0.9, 100),
        (ENV, "ppo", 0, 200, 0, 0.5, 0.5, 10),
        (ENV, "mpc", 0, 0, 0, 0.7, 1.0, 10),
    )
    found = plain.curves(rows).set_index(["policy", "step"])
    assert found.loc[("ppo", 100), "energy_ratio"] == pytest.approx(0.7)
    assert found.loc[("ppo", 100), "attainment"] == pytest.approx(0.975)
    table = plain.markdown(rows)
    assert "| PPO, seed 0 | 200 | 0.500 | 50.00 |" in table  # the last evaluation, not the best
    assert table.index("| mpc |") < table.index("| PPO")


def test_the_committed_page_and_figure_are_made_from_the_committed_rows(plain, tmp_path):
    rows = pd.read_csv(DOCS / "agents" / "plain-sb3.csv")
    page = (DOCS / "train.md").read_text()
    block = re.search(r"<!-- begin:plain-sb3 -->\n(.*?)<!-- end", page, re.DOTALL).group(1)
    assert block.strip() == plain.markdown(rows).strip(), "python docs/update.py plain-sb3=..."
    last = rows[rows["policy"] == "ppo"].groupby(["env", "seed"])["step"].max()
    assert (last >= plain.STEPS).all()
    assert set(last.index.get_level_values("seed")) == set(plain.SEEDS)
    assert set(last.index.get_level_values("env")) == set(plain.ENVS)
    assert set(rows["policy"]) == {"ppo", "max", *plain.SHOWN}
    pytest.importorskip("matplotlib")
    plain.draw(rows, tmp_path / "a.svg")
    plain.draw(rows, tmp_path / "b.svg")
    made = (tmp_path / "a.svg").read_bytes()
    assert made == (tmp_path / "b.svg").read_bytes()
    assert "mpc-plus" in made.decode()


@pytest.mark.slow
def test_the_best_static_clock_holds_the_slo_and_a_lower_one_does_not(plain, monkeypatch):
    monkeypatch.setattr(plain, "EPISODES", 2)
    monkeypatch.setattr(plain, "CLOCKS_MHZ", range(600, 1981, 180))
    best = frame(plain, *plain.best_static(ENV))
    energy, met = plain._mean(best)
    assert met >= plain.TARGET
    lower = []
    for freq_mhz in plain.CLOCKS_MHZ:
        rows = plain.seen(f"static:freq_mhz={freq_mhz}", ENV, "static", 0, 0)
        lower.append(plain._mean(frame(plain, *rows)))
    assert energy == min(e for e, m in lower if m >= plain.TARGET)
    assert min(m for _, m in lower) < plain.TARGET


@pytest.mark.slow
def test_training_is_seen_from_the_untrained_network_on(plain, monkeypatch):
    pytest.importorskip("stable_baselines3")
    monkeypatch.setattr(plain, "EPISODES", 1)
    rows = plain.learn(ENV, 0, steps=2048, every=2048)
    assert rows["step"].tolist() == [0, 2048]
    assert np.isfinite(rows["energy_ratio"]).all()
    assert rows["energy_ratio"].iloc[0] != rows["energy_ratio"].iloc[1]
