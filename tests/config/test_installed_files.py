"""Files that installed packages bring: found by name, after shipped ones; faults are a sentence."""

import sys

import pytest
import yaml

from biscale_env.config import load_named
from biscale_env.config.hardware import Gpu, load_gpu
from biscale_env.config.installed_files import installed_names, installed_path
from biscale_env.core.errors import BiscaleError
from biscale_env.models.coefficient_files import find_folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "outer_files.py").write_text(
        "from pathlib import Path\nGPU = Path(__file__).parent / 'gpu.yaml'\n"
        "GONE = Path(__file__).parent / 'gone.yaml'\nNUMBER = 7\nFOLDER = str(GPU.parent)\n"
    )
    shipped = load_gpu("h100-sxm").model_dump(mode="json") | {"name": "outer", "power_cap_w": 333.0}
    (tmp_path / "gpu.yaml").write_text(
        yaml.safe_dump({k: v for k, v in shipped.items() if v is not None})
    )
    info = tmp_path / "outer_files-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outer-files\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[biscale.gpus]\nouter = outer_files:GPU\ngone = outer_files:GONE\n"
        "number = outer_files:NUMBER\nbroken = outer_nothing:X\nh100-sxm = outer_files:GPU\n"
        "[biscale.models]\nouter/model = outer_files:FOLDER\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("outer_files", None)


def test_a_name_of_a_package_is_its_file(package):
    assert load_gpu("outer").power_cap_w == 333.0
    assert load_named("gpus", "outer", Gpu).name == "outer"
    assert find_folder("outer/model") == package
    assert installed_path("llms", "outer") is None


def test_what_is_shipped_comes_first(package):
    assert "h100-sxm" in installed_names("gpus")
    assert load_gpu("h100-sxm").power_cap_w == 700.0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone", "gpu 'gone' of an installed package: there is no .*gone.yaml"),
        ("number", "outer_files:NUMBER is a int, but must be the path of a file"),
        ("broken", "outer_nothing:X fails with ModuleNotFoundError"),
        ("oute", "known: .*outer.*nearest name is 'outer'"),
    ],
)
def test_faults_are_one_sentence(package, name, said):
    with pytest.raises(BiscaleError, match=said):
        load_gpu(name)
