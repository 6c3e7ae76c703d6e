"""Pages of the controllers are those of today's code, and there is one for every controller."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from docs_modules import docs_module

from biscale_env.envs.plant import Plant, PlantSettings
from controllers.registry import ENTRIES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def maker():
    with docs_module("controller_pages") as module:
        yield module


def test_every_page_is_that_of_the_code(maker):
    for name, text in maker.pages().items():
        committed = (DOCS / "controllers" / name).read_text()
        assert committed == text, "python docs/update.py controllers"


def test_every_controller_has_a_page_with_law_source_and_its_own_parameters(maker):
    assert sorted(n for p in maker.PAGES.values() for n in p.names) == sorted(ENTRIES)
    for key, page in maker.PAGES.items():
        text = (DOCS / "controllers" / f"{key}.md").read_text()
        for part in ("## Law", "## Source, and what was changed", "## Tuned over", "## In a burst"):
            assert part in text, (key, part)
        assert re.search(r"arXiv \d{4}\.\d{5}|20\d\d\)|do-mpc", text), key
        for phase in ENTRIES[page.names[0]].paths:
            assert (DOCS / "controllers" / f"{key}-{phase}.svg").is_file()
    ecofreq = (DOCS / "controllers" / "ecofreq.md").read_text()
    assert "| `bin_requests` | `8.0` |" in ecofreq
    assert "f = f_max " in ecofreq


def test_bursts_are_pictures_with_lines(maker, tmp_path):
    plant = Plant(PlantSettings.of("prefill", actuation_delay_s=0.05, drain=True))
    trace = maker.burst_of("prefill")
    run = maker.rollout(maker.resolve_policy("max", plant), plant, [trace], time_probe=False)[0]
    pytest.importorskip("matplotlib")
    maker.one_burst(tmp_path / "a.svg", "max", {"max": maker.second_by_second(run)}, 24.0)
    lines = ElementTree.parse(tmp_path / "a.svg").findall(".//{http://www.w3.org/2000/svg}path")
    assert len(lines) > 10
