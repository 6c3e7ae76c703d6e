"""README and docs are finished.

Generated blocks are filled, and nothing is left to fill in by hand.
"""

import re
from pathlib import Path

import pytest

from biscale_env.envs.registration import CLUSTER_ID, ENV_IDS, INTERVAL_IDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "ARCHITECTURE.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"<!-- begin:(?P<name>[\w-]+) -->(?P<body>.*?)<!-- end:(?P=name) -->", re.DOTALL)
PLACEHOLDER = re.compile(r"@[A-Z][A-Z0-9_-]*@")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


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


def test_the_readme_is_one_screen_with_its_pictures_and_links():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    pictures = re.findall(r"!\[[^\]]+\]\((docs/[^)]+)\)", text)
    assert len(pictures) == 2
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http", "../../actions")):
            assert (ROOT / target).exists(), target


def test_the_readme_has_every_environment():
    text = (ROOT / "README.md").read_text()
    for env_id in (*ENV_IDS, *INTERVAL_IDS, CLUSTER_ID):
        assert f"| `{env_id}` |" in text, env_id
