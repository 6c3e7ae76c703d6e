"""Files are parsed once per content: never stale, and nobody can spoil it for the others."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from toy_hardware import TOY_GPU, toy_family

from biscale_env.config import Gpu, load_gpu, load_slo, load_yaml, loader
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.models import load_model
from biscale_env.traces import load_lengths, load_workload


def rewrite(path: Path, old: str, new: str) -> None:
    """Change a file of the same length without a trace in its time stamp."""
    assert len(old) == len(new)
    stat, text = path.stat(), path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def family(tmp_path):
    return toy_family(tmp_path / "family", tps=(2,))


def test_a_changed_gpu_is_seen_whatever_its_time_stamp(family):
    def plant():
        return Plant(PlantSettings.of("decode", model=str(family), tp=2))

    before = plant()
    rewrite(family / "toy-40gb.yaml", "memory_gb: 40", "memory_gb: 48")
    assert plant().kv_capacity_tokens > before.kv_capacity_tokens
    rewrite(family / "toy-40gb.yaml", "[300, 500, 700", "[300, 500, 800")
    assert plant().clocks.levels_mhz == (300, 500, 800, 900, 1200)
    rewrite(family / "toy-9b.yaml", "layers: 32", "layers: 64")
    assert plant().llm.layers == 64


def test_a_changed_ensemble_is_seen_whatever_its_time_stamp(family):
    file = family / "decode-bf16-tp2.ensemble.csv"
    before = load_model("decode", 2, name=str(family))
    lines = file.read_text().splitlines()
    head, first, second, *rest = lines
    stat = file.stat()
    file.write_text("\n".join([head, second, first, *rest]) + "\n")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = load_model("decode", 2, name=str(family))
    assert (after.member(0), after.member(1)) == (before.member(1), before.member(0))
    assert after.digest != before.digest


def test_a_changed_slo_and_profile_are_seen(tmp_path):
    slo = tmp_path / "mine.yaml"
    slo.write_text("name: mine\nttft_s: 0.5\ntpot_s: 0.1\nattainment: 0.99\n")
    assert load_slo(str(slo)).ttft_s == 0.5
    rewrite(slo, "0.5", "0.7")
    assert load_slo(str(slo)).ttft_s == 0.7


def test_a_file_is_parsed_once_per_content(monkeypatch):
    first = load_gpu(TOY_GPU)
    monkeypatch.setattr(loader, "parse_yaml", None)
    assert load_gpu(TOY_GPU) == first


def test_what_a_caller_changes_nobody_else_sees():
    mine = load_gpu()
    mine.sources["peak"] = "spoiled"
    assert load_gpu().sources["peak"] != "spoiled"
    profile = load_workload("azure-conv-like")
    profile.measured["x"] = 1.0
    assert "x" not in load_workload("azure-conv-like").measured
    assert load_lengths("azure-conv") == load_lengths("azure-conv")


def test_a_shared_model_cannot_be_written():
    model = load_model("decode", 4)
    assert load_model("decode", 4) is model
    for spoil in (
        lambda: model._members.__setitem__("host0_s", 1.0),
        lambda: model._delays_s.__setitem__(0, 1.0),
    ):
        with pytest.raises(ValueError, match="read-only"):
            spoil()
    records = model.records([-1, 0])
    records["host0_s"] = 7.0
    assert model.member(0).host0_s != 7.0
    copy = pickle.loads(pickle.dumps(model))
    assert copy.coefficients == model.coefficients
    assert np.array_equal(copy.records([0, 5]), model.records([0, 5]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("delay_s,host0_s\n0.1,0.2\n0.1\n", "rows differ in length"),
        ("delay_s,hosts\n0.1,1\n", "column hosts is not the name of a coefficient"),
        ("delay_s,host0_s\n0.1,x\n", "finite number"),
        ("delay_s,host0_s\n0.1,-1\n", "finite number"),
        ("delay_s,host0_s\n0.1,inf\n", "finite number"),
        ("", "the table is empty"),
        ("# a comment alone\n", "the table is empty"),
    ],
)
def test_a_bad_ensemble_is_one_sentence(family, text, words):
    from biscale_env.core.errors import BiscaleError

    (family / "decode-bf16-tp2.ensemble.csv").write_text(text)
    with pytest.raises(BiscaleError, match=words) as caught:
        load_model("decode", 2, name=str(family))
    assert "decode-bf16-tp2.ensemble.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_ensemble_without_delays_has_that_of_the_nominal_model(family):
    (family / "decode-bf16-tp2.ensemble.csv").write_text("host0_s\n0.1\n0.2\n")
    model = load_model("decode", 2, name=str(family))
    assert [model.member(k).host0_s for k in (0, 1)] == [0.1, 0.2]
    assert model.delay_s(0) == model.delay_s(1) == model.delay_s() > 0.0


def test_yaml_written_by_hand_reads_as_the_safe_loader_reads_it(tmp_path):
    file = tmp_path / "g.yaml"
    file.write_text(Path(TOY_GPU).read_text() + "sources: {x: 'ä ü', y: 1e3}\n", encoding="utf-8")
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    data["sources"]["y"] = str(data["sources"]["y"])
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    assert load_yaml(file, Gpu) == Gpu.model_validate(data)
