"""Pages read alike on a forge and on the site, whose Markdown is stricter.

Python-Markdown takes a list or a table that follows a paragraph without an empty line for a part of
it, and needs an extension for struck-through text.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"\s*(?:```|~~~)")
ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+\S")


def kind_of(line, before):
    """What a line outside of code is, given the kind of the line before."""
    if not line.strip():
        return "blank"
    if line.startswith("#"):
        return "heading"
    if line.startswith("<!--"):
        return "comment"
    if line.lstrip().startswith("|"):
        return "table"
    if ITEM.match(line) or before == "list":
        return "list"
    return "text"


def cells(row):
    """Cells of a row of a table; a pipe that is meant needs a backslash, also in code."""
    return len(re.findall(r"(?<!\\)\|", row)) - 1


def faults(text):
    """What the site would show otherwise than a forge: (number of the line, what)."""
    before, wanted, code, titles, found = "blank", 0, False, 0, []
    for number, line in enumerate(text.splitlines(), 1):
        if FENCE.match(line):
            code, before = not code, "blank"
            continue
        if code:
            continue
        kind = kind_of(line, before)
        titles += line.startswith("# ")
        if kind in ("list", "table") and before in ("text", "table") and kind != before:
            found.append((number, f"a {kind} without an empty line before it"))
        if kind == "table":
            wanted = wanted if before == "table" else cells(line)
            if cells(line) != wanted:
                found.append((number, f"{cells(line)} cells in a table of {wanted} columns"))
        before = kind
    return found + ([] if titles == 1 else [(0, f"{titles} titles")])


def test_faults_by_hand():
    assert faults("# A\n\nText\n\n- one\n  more of it\nand lazily\n- two\n") == []
    assert faults("# A\n\n| a | b |\n|--|--|\n| `x\\|y` | |\n") == []
    assert faults("# A\n```\nText\n- no list\n# no title\n```\n- list\n") == []
    assert faults("# A\n\nText:\n- one\n") == [(4, "a list without an empty line before it")]
    assert faults("# A\nText:\n1. one\n") == [(3, "a list without an empty line before it")]
    assert faults("# A\n\nText\n| a |\n|--|\n") == [(4, "a table without an empty line before it")]
    assert faults("# A\n| a |\n|--|\n| `x|y` |\n") == [(4, "2 cells in a table of 1 columns")]
    assert faults("Text\n") == [(0, "0 titles")]
    assert faults("# A\n# B\n") == [(0, "2 titles")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_reads_alike_on_the_site(page):
    assert faults(page.read_text()) == []


def test_struck_through_text_is_struck_through_on_the_site():
    assert any("~~" in page.read_text() for page in PAGES)
    assert "pymdownx.tilde" in (ROOT / "mkdocs.yml").read_text()
