"""README and docs are finished.

Generated blocks are filled, and nothing is left to fill in by hand.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "ARCHITECTURE.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(r"<!-- begin:(?P<name>[\w-]+) -->(?P<body>.*?)<!-- end:(?P=name) -->", re.DOTALL)
PLACEHOLDER = re.compile(r"@[A-Z][A-Z0-9_-]*@")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_there_are_pages_with_blocks():
    assert len(PAGES) > 8
    assert sum(len(BLOCK.findall(page.read_text())) for page in PAGES) > 5


@pages
def test_every_block_ends_and_holds_something(page):
    text = page.read_text()
    blocks = {found["name"]: found["body"] for found in BLOCK.finditer(text)}
    assert sorted(blocks) == sorted(re.findall(r"<!-- begin:([\w-]+) -->", text)), (
        "a block without its end"
    )
    assert sorted(blocks) == sorted(re.findall(r"<!-- end:([\w-]+) -->", text)), (
        "an end without its block"
    )
    assert [name for name, body in blocks.items() if not body.strip()] == []


@pages
def test_no_placeholder_is_left(page):
    assert PLACEHOLDER.findall(page.read_text()) == []
