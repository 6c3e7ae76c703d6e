"""A capacity found before is read, not searched; everything it depends on is in its key."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from toy_hardware import TOY_GPU, TOY_LLM

from biscale_env.config import configs_dir, load_slo
from biscale_env.envs.loads import capacity
from biscale_env.envs.loads.capacity import (
    SearchSettings,
    capacity_key,
    find_capacity,
    profile_capacity,
)
from biscale_env.envs.loads.workloads import WorkloadSource, generated, trace_windows
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.traces import Trace, generate

PROFILE = "gamma-sharegpt-like"
TRACE = generate(PROFILE, rate_rps=5.0, duration_s=120.0, seed=0)
FEW = {"seeds": (0,), "tolerance": 0.2}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(capacity, "_found", {})


@pytest.fixture
def forget(monkeypatch):
    """As if a new process had been started: nothing in memory."""
    return lambda: monkeypatch.setattr(capacity, "_found", {})


@pytest.fixture
def no_search(monkeypatch):
    def refuse(*_):
        raise AssertionError("searched again")

    return lambda: monkeypatch.setattr(capacity, "_search", refuse)


def plant(**changes):
    return Plant(PlantSettings.of("prefill", **changes))


def files(tmp_path):
    return sorted((tmp_path / "cache" / "instance-capacity").glob("*.json"))


@pytest.mark.slow
def test_what_was_found_is_read_to_the_last_bit(tmp_path, forget, no_search):
    found = find_capacity(plant(), TRACE, **FEW), profile_capacity(plant(), PROFILE)
    assert len(files(tmp_path)) == 2
    assert found[0].rate_rps > 0
    forget()
    no_search()
    assert (find_capacity(plant(), TRACE, **FEW), profile_capacity(plant(), PROFILE)) == found
    renamed = replace(TRACE, name="other", source="elsewhere")
    assert find_capacity(plant(actuation_delay_s=1.0), renamed, **FEW) == found[0]


@pytest.mark.slow
def test_a_profile_found_before_is_not_even_generated(monkeypatch, no_search):
    found = profile_capacity(plant(), PROFILE)
    monkeypatch.setattr(Trace, "__post_init__", None)
    no_search()
    assert profile_capacity(plant(), PROFILE) is found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"rate_rps": 3}',
        '{"rate_rps": -1, "attainment": 1, "tried": [[1, 1]]}',
        '{"rate_rps": NaN, "attainment": 1, "tried": [[1, 1]]}',
        '{"rate_rps": 1, "attainment": 1, "tried": [3]}',
        '{"rate_rps": "x", "attainment": 1, "tried": [[1, 1]]}',
        "\x00\xff",
    ],
)
def test_a_damaged_file_is_made_again(tmp_path, forget, text):
    found = find_capacity(plant(), TRACE, **FEW)
    (file,) = files(tmp_path)
    file.write_text(text, encoding="latin-1")
    forget()
    assert find_capacity(plant(), TRACE, **FEW) == found
    assert json.loads(file.read_text())["rate_rps"] == found.rate_rps


def test_a_cache_that_cannot_be_written_is_no_harm(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path / "file"))
    found = find_capacity(plant(), TRACE, **FEW)
    monkeypatch.setattr(capacity, "_search", None)
    assert find_capacity(plant(), TRACE, **FEW) is found, "kept in memory at least"


def test_a_generator_that_cannot_say_what_it_makes_is_not_kept(tmp_path):
    find_capacity(plant(), TRACE, make=trace_windows(TRACE), **FEW)
    assert not files(tmp_path)


HOW = SearchSettings(1980.0)


def key_of(how=HOW, work="w", slo=None, **changes):
    given = PlantSettings.of("prefill", **changes)
    return capacity_key(Plant(given, slo), how, work)


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": TOY_GPU, "llm": TOY_LLM}, {"llm": TOY_LLM}, {"tp": 8}, {"dtype": "fp8"},
        {"token_budget": 1024},
        {"max_seqs": 16}, {"kv_watermark": 0.1}, {"slo": "mlperf-server"}, {"work": "other"},
        {"how": SearchSettings(1200.0)}, {"how": SearchSettings(1980.0, (0,))},
        {"how": SearchSettings(1980.0, member=3)}, {"how": SearchSettings(1980.0, tolerance=0.1)},
        {"slo": load_slo().model_copy(update={"attainment": 0.9})},
    ],
    ids=str,
)  # fmt: skip
def test_the_key_changes_with_what_matters(change):
    if isinstance(change.get("slo"), str):
        change = {"slo": load_slo(change["slo"])}
    assert key_of() == key_of() != key_of(**change)


def test_the_key_changes_with_the_gpu_alone():
    assert key_of(llm=TOY_LLM) != key_of(llm=TOY_LLM, gpu=TOY_GPU)


@pytest.mark.parametrize(
    "change", [{"actuation_delay_s": 0.2}, {"drain": True}, {"slo": "renamed"}]
)
def test_the_key_does_not_change_with_what_does_not(change):
    if "slo" in change:
        change = {"slo": load_slo().model_copy(update={"name": "renamed"})}
    assert key_of() == key_of(**change)


def copied(tmp_path):
    folder = configs_dir() / "models" / "h100-sxm/llama-3.3-70b"
    for name in ("prefill-bf16-tp4.yaml", "prefill-bf16-tp4.ensemble.csv"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path / "prefill-bf16-tp4.yaml"


@pytest.mark.parametrize("which", ["work", "host", "ensemble"])
def test_the_key_changes_with_a_fitted_model(tmp_path, which):
    file = copied(tmp_path)
    before = key_of(model=str(file))
    assert before == key_of(), "the same content elsewhere is the same model"
    if which == "ensemble":
        table = file.with_suffix(".ensemble.csv")
        table.write_text(table.read_text().rsplit("\n", 2)[0] + "\n")
    else:
        data = yaml.safe_load(file.read_text())
        given = data["coefficients"]
        if which == "work":
            given["gemm_s_per_token"]["value"] *= 2
        else:  # the GPU's layer gives it, unless the model's own file does
            assert "host0_s" not in given
            given["host0_s"] = {"value": 0.5, "provenance": "assumed", "source": "this test"}
        file.write_text(yaml.safe_dump(data))
    assert key_of(model=str(file)) != before


def test_workloads_are_made_without_reading_a_profile_again(monkeypatch):
    source = WorkloadSource(generated("azure-conv-diurnal"), 3.0, 60.0)
    expected = generate("azure-conv-diurnal", rate_rps=3.0, duration_s=60.0, seed=7)
    from biscale_env.config import loader

    monkeypatch.setattr(loader, "read_bytes", None)
    assert source.make(3.0, 60.0, 7) == expected
    assert source.workload(0) == source.workload(0) != source.workload(1)


@pytest.mark.slow
def test_an_edited_profile_is_another_workload(tmp_path):
    shipped = configs_dir() / "traces" / f"{PROFILE}.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(shipped.read_text())
    assert profile_capacity(plant(), str(mine)) == profile_capacity(plant(), PROFILE)
    data = yaml.safe_load(shipped.read_text())
    data["arrivals"]["gap_cv"] = 6.0
    mine.write_text(yaml.safe_dump(data))
    assert (
        profile_capacity(plant(), str(mine)).rate_rps < profile_capacity(plant(), PROFILE).rate_rps
    )
    made = generate(str(mine), rate_rps=5.0, duration_s=120.0, seed=0)
    assert not np.array_equal(made.arrival_s, TRACE.arrival_s)
