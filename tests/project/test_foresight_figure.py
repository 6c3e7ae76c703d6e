"""The figure of what foresight is worth: made from the committed table, nothing invented."""

import re
from pathlib import Path

import pandas as pd
import pytest
from docs_modules import docs_module

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def foresight():
    with docs_module("foresight_figure") as module:
        yield module


COLUMNS = ["scenario", "load", "policy", "equal_ratio", "energy_ratio", "attainment", "target_met"]


def test_controllers_stand_at_the_slo_and_plans_as_they_ended(foresight, tmp_path):
    nan = float("nan")
    rows = [
        ("synthetic", 0.5, "oracle", nan, 0.5, 0.991, True),
        ("synthetic", 0.5, "mpc", 0.7, 0.75, 0.995, True),
        ("synthetic", 0.5, "agent", nan, 0.6, 0.97, False),
        ("synthetic", 0.5, "lookahead:seconds=0", nan, 0.6, 0.98, False),
        ("synthetic", 0.5, "max", 1.0, 1.0, 1.0, True),
    ]
    pd.DataFrame(rows, columns=COLUMNS).to_csv(tmp_path / "t.csv", index=False)
    table = foresight.markdown(tmp_path / "t.csv").splitlines()
    cells = "| synthetic, 50 % | 0.700 | – | ~~0.600 (98.00)~~ | 0.500 (99.10) |"
    assert table[-1] == cells
    assert "max" not in table[0]


def test_page_and_figure_are_those_of_the_committed_table(foresight, tmp_path):
    csv = DOCS / "experiment-foresight.csv"
    page = (DOCS / "bounds.md").read_text()
    block = re.search(r"<!-- begin:foresight -->\n(.*?)<!-- end", page, re.DOTALL).group(1)
    assert block.strip() == foresight.markdown(csv).strip(), "docs/update.py experiment:foresight"
    pytest.importorskip("matplotlib")
    foresight.draw(csv, tmp_path / "a.svg")
    for path in (tmp_path / "a.svg", DOCS / "bounds" / "foresight.svg"):
        made = path.read_text()
        for label, _ in foresight.LOOKS.values():
            assert label in made
        assert all(f"<!-- {point} -->" in made for point in foresight.of_points(csv).index)
