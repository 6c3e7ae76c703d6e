"""Tables of docs/agents.md that come from training runs."""

import re
from pathlib import Path

import pandas as pd
import pytest
from docs_modules import docs_module

from biscale_env.core.errors import BiscaleError

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_ways_to_train_are_compared_on_the_seeds_that_all_have():
    def curves(scores):
        rows = [
            {"seed": seed, "step": 1000 * k, "score": score}
            for seed, line in scores.items()
            for k, score in enumerate(line)
        ]
        return pd.DataFrame(rows)

    usual = curves({0: [0.8, 0.6, 0.7], 1: [0.9, 0.7, 0.65], 2: [9.0, 9.0, 9.0]})
    other = curves({0: [0.5, 0.4], 1: [0.6, 0.5]})
    with docs_module("agent_tables") as tables:
        table = tables.runs_markdown("way", {"usual": usual, "other": other}).splitlines()
    assert table[2].startswith("| usual | 2 | 2,000 | 0.8500 [0.8000, 0.9000] | 0.6750 [0.65")
    assert table[2].endswith("| 0.6250 [0.6000, 0.6500] |")
    assert "| other | 2 | 1,000 | 0.5500 [0.5000, 0.6000] |" in table[3]
    assert "2,000" not in table[3]
    alone = curves({7: [0.5, 0.4]})
    words = "usual and alone have no training seed in common"
    with docs_module("agent_tables") as tables, pytest.raises(BiscaleError, match=words):
        tables.runs_markdown("way", {"usual": usual, "alone": alone})


@pytest.mark.parametrize(
    ("block", "head", "ways"),
    [
        (
            "teachers",
            "teacher",
            {"MPC with its extras": "-ppo", "plans that know 0.5 s": "-lookahead"},
        ),
        ("policy-iteration", "algorithm", {"PPO": "-ppo", "policy iteration": ""}),
    ],
)
def test_tables_of_the_page_are_those_of_the_committed_curves(block, head, ways):
    runs = {
        way: pd.read_csv(DOCS / "agents" / f"curves-prefill{name}.csv")
        for way, name in ways.items()
    }
    page = (DOCS / "agents.md").read_text()
    stated = re.search(rf"<!-- begin:{block} -->\n(.*?)<!-- end", page, re.DOTALL).group(1)
    with docs_module("agent_tables") as tables:
        assert stated.strip() == tables.runs_markdown(head, runs).strip(), "docs/update.py"
