"""Files for forges and containers: they parse, and what they name is there."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def dockerfile():
    """Instructions of the Dockerfile by stage: lists of (name, words)."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    stages = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            if name == "FROM":
                stages.append([])
            stages[-1].append((name, rest.strip()))
    return stages


def copied():
    """Sources that the first stage copies from the checkout."""
    words = [shlex.split(rest) for name, rest in dockerfile()[0] if name == "COPY"]
    return [source for line in words for source in line[:-1]]


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_workflow_calls_targets_of_make_that_ci_runs_too():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    ours = (ROOT / ".ci/run").read_text()
    called = [shlex.split(c) for job in WORKFLOW["jobs"].values() for c in commands(job)]
    assert called
    for words in called:
        assert words[0] == "make"
        assert words[1] in targets
        assert f"make {words[1]}" in ours
    gates = set(re.findall(r"step (?:timeout \S+ \d+ )*(?:\S+ )*?make ([a-z-]+)", ours))
    assert gates - {"test-engine"} <= {words[1] for words in called}


def test_the_workflow_covers_the_pythons_that_are_supported():
    matrix = WORKFLOW["jobs"]["fast"]["strategy"]["matrix"]["python"]
    assert matrix == [f"3.{minor}" for minor in range(11, 15)]
    assert PROJECT["requires-python"] == f">={matrix[0]}"
    for job in WORKFLOW["jobs"].values():
        assert job["timeout-minutes"] <= 120
        (python,) = [s["with"]["python-version"] for s in job["steps"] if "with" in s]
        assert python in [*matrix, "${{ matrix.python }}"]


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.stem)
def test_issue_forms_have_what_a_form_needs(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert isinstance(form["blank_issues_enabled"], bool)
        return
    assert {"name", "description", "body"} <= set(form)
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))
    for part in form["body"]:
        assert part["type"] in {"textarea", "input", "dropdown", "checkboxes"}
        assert part["attributes"]["label"]
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_the_citation_is_that_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_the_image_copies_what_is_there_and_what_is_not_ignored():
    kept = {s[1:] for s in (ROOT / ".dockerignore").read_text().splitlines() if s.startswith("!")}
    assert copied()
    for source in copied():
        assert (ROOT / source).exists()
        assert source in kept


def test_the_image_runs_as_nobody_in_particular_and_writes_only_its_folders():
    last = dict(dockerfile()[-1])
    assert int(last["USER"]) > 0
    assert "1777 /cache /runs" in last["RUN"]
    variables = dict(pair.split("=", 1) for pair in shlex.split(last["ENV"]))
    assert {variables["HOME"], variables["XDG_CACHE_HOME"]} == {"/cache"}
    assert variables["PYTHONDONTWRITEBYTECODE"] == "1"
    assert last["ENTRYPOINT"] == '["biscale"]'
    assert last["FROM"].endswith("-slim")


def test_the_image_installs_extras_that_exist():
    (extras,) = [r.partition("=")[2] for n, r in dockerfile()[0] if n == "ARG"]
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


@pytest.mark.slow
def test_the_copied_files_build_a_wheel_with_everything(tmp_path):
    for source in copied():
        target = tmp_path / "src" / source
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, target)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(tmp_path / "src")], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("biscale_env/cli/__init__.py", "controllers/registry.py", "agents/__init__.py"):
        assert needed in names
    configs = [p for p in (ROOT / "configs").rglob("*.yaml")]
    assert {f"biscale_env/_configs/{p.relative_to(ROOT / 'configs')}" for p in configs} <= set(
        names
    )
