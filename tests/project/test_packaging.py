"""The wheel: complete, and enough by itself."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pandas as pd
import pytest

import biscale_env

ROOT = Path(__file__).resolve().parents[2]


def minimums() -> dict[str, str]:
    """Direct dependencies of the base and of the extras of the oldest row, with the least version
    allowed.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"^ROW_EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert extras
    names = extras[1].split(",")
    wanted = [
        *project["dependencies"],
        *(d for n in names for d in project["optional-dependencies"][n]),
    ]
    pairs = (re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", d) for d in wanted)
    return {canonical(m[1]): m[2] for m in pairs if m}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return {canonical(n): v for n, v in (line.split("==") for line in lines if line)}


def test_the_oldest_row_has_exactly_the_minimums_of_pyproject():
    """After a changed minimum, `uv pip compile --resolution lowest-direct` makes the file anew."""
    oldest = pins("constraints-oldest.txt")
    least = minimums()
    assert len(least) > 20
    wrong = {
        n: (oldest.get(n), v)
        for n, v in least.items()
        if not f"{oldest.get(n)}.".startswith(re.sub(r"(\.0)+$", "", v) + ".")
    }
    assert wrong == {}


def test_every_direct_dependency_is_pinned():
    assert set(minimums()) - set(pins("constraints.txt")) == set()


def test_one_version_everywhere_that_of_the_changelog():
    stated = {
        file: tomllib.loads((ROOT / file).read_text())["project"]["version"]
        for file in ("pyproject.toml", "packaging/engine-hook/pyproject.toml")
    }
    assert set(stated.values()) == {biscale_env.__version__}, stated
    newest = re.search(r"^## ([\d.]+)(.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    released = newest[2].strip() != "(unreleased)"
    assert biscale_env.__version__ == newest[1] + ("" if released else ".dev0")


def third_party_imports() -> dict[str, set[str]]:
    """Top-level modules that our packages import, those that are caught where missing left out."""
    found: dict[str, set[str]] = {}
    for package in ("biscale_env", "controllers", "agents"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text())
            caught = {
                id(node)
                for attempt in ast.walk(tree)
                if isinstance(attempt, ast.Try)
                for node in ast.walk(attempt)
            }
            for node in ast.walk(tree):
                if id(node) in caught:
                    continue
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                for name in names:
                    found.setdefault(name.split(".")[0], set()).add(str(path.relative_to(ROOT)))
    return found


def test_every_import_is_of_a_declared_dependency():
    """What another package happens to bring may be gone with its next version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [d for group in project["optional-dependencies"].values() for d in group]
    declared = {canonical(re.split(r"[^\w.-]", d)[0]) for d in [*project["dependencies"], *extras]}
    provided = importlib.metadata.packages_distributions()
    ours = {"biscale_env", "controllers", "agents"}
    engines = {"vllm", "sglang"}  # their environment is theirs; the hook runs inside
    missing = {
        module: sorted(files)
        for module, files in third_party_imports().items()
        if module not in sys.stdlib_module_names | ours | engines
        and not declared & {canonical(d) for d in provided.get(module, [module])}
    }
    assert missing == {}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(ROOT),
    ]
    subprocess.run(command, check=True, timeout=300)
    (made,) = out.glob("*.whl")
    return made


@pytest.mark.slow
def test_wheel_carries_configs_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {
        n.removeprefix("biscale_env/_configs/")
        for n in names
        if n.startswith("biscale_env/_configs/")
    }
    here = {
        str(p.relative_to(ROOT / "configs")) for p in (ROOT / "configs").rglob("*") if p.is_file()
    }
    assert shipped == here
    assert {n.split("/")[0] for n in names if not n.startswith("biscale_env-")} == {
        "biscale_env",
        "controllers",
        "agents",
    }


@pytest.mark.slow
def test_wheel_alone_compares_from_an_empty_folder(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel]
    alone = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }  # the wheel, not this checkout
    subprocess.run(install, check=True, timeout=900, env=alone)
    empty = tmp_path / "empty"
    empty.mkdir()
    biscale = tmp_path / "env" / "bin" / "biscale"
    done = subprocess.run(
        [biscale, "compare", "--quick"],
        cwd=empty,
        capture_output=True,
        text=True,
        timeout=300,
        env=alone,
    )
    assert done.returncode == 0, done.stderr
    (results,) = empty.rglob("results.parquet")
    assert set(pd.read_parquet(results).phase) == {"prefill", "decode"}
    (report,) = empty.rglob("report.html")
    assert report.stat().st_size > 1_000_000  # the plotting library is inside
    asked = "import biscale_env, sys; print('torch' in sys.modules, biscale_env.__file__)"
    probe = subprocess.run(
        [python, "-c", asked], cwd=empty, capture_output=True, text=True, env=alone
    )
    loaded, place = probe.stdout.split(maxsplit=1)
    assert loaded == "False"
    assert Path(place).is_relative_to(tmp_path / "env")
