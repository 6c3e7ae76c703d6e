"""The site: every page has a place, every named module exists; built where it can be."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


class SiteLoader(yaml.SafeLoader):
    """Reads settings that the environment may change as their defaults."""


SiteLoader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node)[-1])
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), SiteLoader)
GENERATED = {"reference/cli.md"}


def placed(entry):
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [page for child in children for page in placed(child)]


def test_every_page_of_docs_has_one_place_and_every_place_a_page():
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    notebooks = {f"notebooks/{p.name}" for p in (ROOT / "notebooks").glob("*.ipynb")}
    navigation = placed(SITE["nav"])
    assert len(navigation) == len(set(navigation))
    assert set(navigation) == pages | notebooks | GENERATED
    listed = re.findall(
        r"\(\.\./(notebooks/\w+\.ipynb)\)", (ROOT / "docs/notebooks.md").read_text()
    )
    assert listed == [name for name in navigation if name.endswith(".ipynb")]


def test_it_is_strict_and_reads_from_files_without_the_network():
    assert SITE["strict"] is True
    assert SITE["use_directory_urls"] is False
    assert SITE["theme"]["font"] is False


def test_only_pages_and_pictures_are_published():
    assert SITE["exclude_docs"].split() == ["*.py", "__pycache__/"]
    for sheet in SITE["extra_css"]:
        assert (ROOT / "docs" / sheet).is_file()


def test_modules_of_the_reference_exist():
    texts = [p.read_text() for p in (ROOT / "docs/reference").glob("*.md")]
    modules = re.findall(r"^::: (\S+)$", "\n".join(texts), re.M)
    assert modules
    for module in modules:
        assert importlib.util.find_spec(module), module


@pytest.mark.slow
def test_it_builds_and_has_every_command(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("mkdocs_jupyter")
    plain = {**os.environ, "BISCALE_SITE_EXECUTE": "false"}
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, env=plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reference/cli.html").read_text()
    assert "biscale export perfetto" in page
    page = (tmp_path / "notebooks.html").read_text()
    assert 'href="notebooks/quickstart.html"' in page
    for name in placed(SITE["nav"]):
        page = (tmp_path / name).with_suffix(".html").read_text()
        assert len(page) > 5000
        assert not re.search(r'<script[^>]*src="https?:', page), name
