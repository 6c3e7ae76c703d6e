"""The wheel: complete, and enough by itself."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]


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
