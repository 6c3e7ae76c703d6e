"""The README's pictures: every controller where the table has it; a burst whose sums are right."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from docs_modules import docs_module

from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.policies import resolve_policy

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def figures():
    pytest.importorskip("matplotlib")
    with docs_module("readme_figures") as module:
        yield module


@pytest.mark.slow
def test_the_committed_energy_figure_is_that_of_the_table(figures, tmp_path):
    figures.energy(DOCS / "experiment-main.csv", tmp_path / "energy.svg")
    table = pd.read_csv(DOCS / "experiment-main.csv")
    at = table[(table["scenario"] == figures.POINT[0]) & (table["load"] == figures.POINT[1])]
    assert len(at) > 20
    for text in ((tmp_path / "energy.svg").read_text(), (DOCS / "readme/energy.svg").read_text()):
        labels = re.findall(r"<!-- (\S+)  (\d\.\d\d) -->", text)
        assert sorted(labels) == sorted(
            (row["policy"], f"{row['energy_ratio']:.2f}") for _, row in at.iterrows()
        ), "python docs/update.py readme"


@pytest.mark.parametrize("name", ["energy", "burst"])
def test_a_picture_opened_by_itself_fits_a_window_of_1000_px(name):
    root = ElementTree.parse(DOCS / f"readme/{name}.svg").getroot()
    number, unit = re.fullmatch(r"([\d.]+)(pt|)", root.get("width")).groups()
    assert float(number) * {"pt": 96 / 72, "": 1.0}[unit] <= 1000.0


@pytest.fixture(scope="module")
def seen(figures):
    plant = Plant(PlantSettings.of("prefill", actuation_delay_s=0.05, drain=True))
    trace = figures.burst_trace()
    return [figures.look(n, "#000", plant, trace, trace.duration_s) for n in ("max", "mpc")], trace


def test_counters_are_those_of_the_run(figures, seen):
    (top, mpc), trace = seen
    plant = Plant(PlantSettings.of("prefill", actuation_delay_s=0.05, drain=True))
    run = rollout(resolve_policy("max", plant), plant, [trace], time_probe=False)[0]
    assert top.late[-1] == run.totals["n_violations"]
    after_s = run.totals["duration_s"] - trace.duration_s
    assert top.energy_kj[-1] * 1e3 == pytest.approx(run.totals["energy_j"], rel=0.03 + after_s / 24)
    assert mpc.energy_kj[-1] < 0.8 * top.energy_kj[-1]
    assert top.lines["queue"].max() >= 3
    assert np.nanmax(top.lines["power"]) <= 700.0 + 1e-6


def test_the_animation_is_small_and_shows_its_end_where_nothing_moves(figures, seen):
    runs, trace = seen
    text = figures.animated(runs, trace.duration_s)
    assert len(text) < 60_000
    root = ElementTree.fromstring(text)
    svg = "{http://www.w3.org/2000/svg}"
    cover = root.find(f"{svg}clipPath/{svg}rect")
    assert float(cover.get("width")) > 600  # as drawn; only the animation begins at 0
    shown = [t.text for t in root.iter(f"{svg}text") if t.get("opacity") == "1"]
    assert shown == [f"{s.energy_kj[-1]:.1f} kJ, {s.late[-1]:.0f} late" for s in runs]
    committed = (DOCS / "readme" / "burst.svg").read_text()
    assert [t for t in shown if f">{t}<" not in committed] == [], "python docs/update.py readme"
    for text_of_time in re.findall(r'keyTimes="([^"]+)"', text):
        times = [float(x) for x in text_of_time.split(";")]
        assert times == sorted(times)
        assert (times[0], times[-1]) == (0.0, 1.0)
