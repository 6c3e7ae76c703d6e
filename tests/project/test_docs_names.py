"""Names that pages give exist: attributes of a run, keys of descriptions, run directories."""

import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from page_blocks import page_blocks

from biscale_env.config.hardware import Gpu, Llm
from biscale_env.evaluation.runs.run_view import Run

DOCS = Path(__file__).resolve().parents[2] / "docs"
# A folder that another page has written is refused: every command writes one of its own.
WRITES = re.compile(
    r"^biscale (?:compare|evaluate|replay|train|benchmark|offline|reproduce)\b.* --out (\S+)"
)


def attributes(text):
    """Attributes of a run that a text names: (name, whether it is called with something)."""
    return {(name, call) for name, call in re.findall(r"`(?:run)?\.([a-z]\w*)(\([^`]*\))?`", text)}


def test_attributes_of_a_run_exist():
    named = attributes((DOCS / "reference" / "run-directory.md").read_text())
    assert {name for name, _ in named} >= {"results", "summary", "requests_of", "timeline_of"}
    run = Run(Path("nowhere"), pd.DataFrame({"run_id": ["a"]}))
    for name, call in named:
        found = getattr(Run, name, None) or vars(run)[name]
        assert callable(found) == bool(call), name


@pytest.mark.parametrize(
    ("model", "heading"), [(Gpu, "The keys of a GPU"), (Llm, "The keys of an LLM")]
)
def test_every_key_of_a_description_is_explained(model, heading):
    table = (DOCS / "instances.md").read_text().partition(heading)[2].partition("\n\n")[2]
    rows = table.partition("\n\n")[0].splitlines()[2:]
    keys, optional = [], set()
    for row in rows:
        cell = row.split("|")[1]
        named = re.findall(r"`(\w+)`", cell)
        keys += named
        optional |= set(named) if "(" in cell else set()
    assert sorted(keys) == sorted(model.model_fields)
    assert optional == {k for k, field in model.model_fields.items() if not field.is_required()}


def test_no_two_commands_of_the_guides_write_the_same_run():
    written = Counter()
    for path in sorted(DOCS.rglob("*.md")):
        for block in page_blocks(path.read_text()):
            joined = re.sub(r"\\\n\s*", " ", block.code)
            for line in joined.splitlines():
                if (
                    (found := WRITES.match(line))
                    and "--resume" not in line
                    and "|| true" not in line
                ):
                    written[found[1]] += 1
    assert len(written) > 15
    assert {folder: n for folder, n in written.items() if n > 1} == {}
