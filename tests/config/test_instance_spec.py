"""One description of an instance: all that is physical follows the GPU and LLM that are given."""

import warnings
from pathlib import Path

import pytest
from toy_hardware import TOY_GPU, TOY_LLM

from agents.training.train_config import AgentConfig
from biscale_env.config import InstanceSpec, load_gpu, load_llm
from biscale_env.config.loader import load_named
from biscale_env.core.errors import BiscaleError, BiscaleWarning
from biscale_env.envs.cluster.cluster_settings import ClusterPlant, ClusterSettings
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.rollouts.scenarios import load_scenario
from biscale_env.models import iteration_model, load_model

GPU, LLM = load_gpu(TOY_GPU), load_llm(TOY_LLM)


def test_the_default_is_the_fitted_hardware():
    plain, named = (
        Plant(PlantSettings.of("decode", **given))
        for given in ({}, {"gpu": "h100-sxm", "llm": "llama-3.3-70b"})
    )
    assert plain.model is named.model, "nothing differs, so nothing is moved"
    assert plain.model.fitted_on == ""
    assert (plain.kv_capacity_tokens, plain.model.coefficients.p_cap_w) == (405_273, 700.0)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_memory_cap_clocks_and_levels_follow_a_gpu(phase):
    plant = Plant(PlantSettings.of(phase, tp=4, gpu=TOY_GPU, llm=TOY_LLM))
    assert plant.gpu == plant.model.gpu == GPU
    assert plant.llm == plant.model.llm == LLM
    assert plant.kv_capacity_tokens == LLM.kv_capacity_tokens(GPU, 4, "bf16")
    assert plant.clocks.levels_mhz == GPU.control_levels_mhz
    assert (plant.clocks.freq_min_mhz, plant.clocks.freq_max_mhz) == (300, 1200)
    for member in (-1, 0, 63):
        assert plant.model.member(member).p_cap_w == 250.0
        params = plant.params(member, 10.0)
        assert int(params["kv_capacity"]) == plant.kv_capacity_tokens
        assert float(params["freq_max_ghz"]) == 1.2
    work = (4096.0, 4096.0**2 / 2, 0.0, 4.0)
    assert float(plant.model.power_w(*work, 1200.0)) <= 250.0 * (1 + 1e-6)


def test_an_llm_that_does_not_fit_says_so():
    with pytest.raises(BiscaleError, match="does not fit on TP 2 of toy-40gb"):
        Plant(PlantSettings.of("decode", tp=2, model="b200-sxm/llama-3.3-70b", gpu=TOY_GPU))


def test_flat_keys_and_an_instance_are_the_same():
    spec = InstanceSpec.of(tp=8, dtype="fp8", max_seqs=64)
    flat = PlantSettings.of("decode", tp=8, dtype="fp8", max_seqs=64)
    nested = PlantSettings.of("decode", instance=spec)
    both = PlantSettings.of("decode", instance=spec.changed(tp=4), tp=8)
    assert flat == nested == both
    assert (flat.tp, flat.dtype, flat.max_seqs, flat.token_budget) == (8, "fp8", 64, 2048)
    assert PlantSettings.model_validate(flat.model_dump()) == flat


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tpp": 4}, "unknown key 'tpp'; the nearest known key is 'tp'"),
        ({"tp": 0}, "environment settings: 'tp' = 0"),
        ({"instance": {"tp": 0}}, "environment settings: 'tp' = 0"),
        ({"max_seqs": 5000}, "'max_seqs' = 5000"),
        ({"gpu": "h100"}, "unknown gpu 'h100'; .*nearest name is 'h100-sxm'"),
        ({"llm": "llama-3.3"}, "unknown llm 'llama-3.3'; .*nearest name is 'llama-3.3-70b'"),
        (
            {"model": "h100-llama-70b"},
            "unknown model 'h100-llama-70b'; .*nearest name is 'h100-sxm/llama-3.3-70b'",
        ),
        ({"slo": "biscal"}, "unknown slo 'biscal'; .*nearest name is 'biscale'"),
        ({"gpu": "no/such.yaml"}, "unknown gpu 'no/such.yaml'"),
        ({"gpu": 3}, "'gpu' = 3"),
        ({"instance": 3}, "'top level' = 3|instance"),
    ],
)
def test_mistakes_are_one_sentence(values, words):
    with pytest.raises(BiscaleError, match=words) as caught:
        Plant(PlantSettings.of("decode", **values))
    assert "\n" not in str(caught.value)


def test_yaml_there_and_back(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(Path(TOY_GPU).parent)
    spec = InstanceSpec.of(gpu=Path(TOY_GPU).name, tp=8, slo="mlperf-server")
    file = spec.to_yaml(tmp_path / "instance.yaml")
    monkeypatch.chdir(tmp_path)
    back = InstanceSpec.from_yaml(file)
    assert back == spec.changed(gpu=TOY_GPU), "a file is named so that it is found from anywhere"
    assert back.changed(gpu=None).to_yaml(file) == file
    assert InstanceSpec.from_yaml(file) == InstanceSpec.of(tp=8, slo="mlperf-server")
    (tmp_path / "mine.yaml").write_text(Path(TOY_GPU).read_text())
    file.write_text("gpu: mine.yaml\n")
    monkeypatch.chdir("/")
    assert load_gpu(InstanceSpec.from_yaml(file).gpu) == GPU, "a file beside the description"
    file.write_text("gpus: x\n")
    with pytest.raises(BiscaleError, match=r"instance.yaml: unknown key 'gpus'"):
        InstanceSpec.from_yaml(file)


def test_a_foreign_gpu_is_warned_about_once(monkeypatch):
    monkeypatch.setattr(iteration_model, "_warned", set())
    with pytest.warns(BiscaleWarning, match="fitted on h100-sxm with llama-3.3-70b; on toy-40gb"):
        load_model("decode", 4, gpu=TOY_GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model("decode", 4, gpu=TOY_GPU)
        load_model("prefill", 4, gpu=TOY_GPU)
        load_model("decode", 4, gpu="h100-sxm")


def test_a_gpu_outside_the_placement_idles_as_its_description_says(tmp_path):
    def spare_w(**changes):
        plants = ClusterPlant(ClusterSettings.of(**changes))
        return plants.spare_power_w(plants.plant("prefill", 4))

    assert spare_w() == 72.0
    toy = {"gpu": TOY_GPU, "llm": TOY_LLM}
    assert (spare_w(**toy), spare_w(**toy, spare="off")) == (31.0, 5.0)
    assert spare_w(**toy, spare_idle_w=50.0) == 50.0
    silent = tmp_path / "silent.yaml"
    silent.write_text(Path(TOY_GPU).read_text().replace("idle_power_w: 31\n", ""))
    waiting = spare_w(gpu=str(silent), llm=TOY_LLM)
    c = load_model("prefill", 4, gpu=TOY_GPU, llm=TOY_LLM).coefficients
    assert c.p_static_w < waiting < c.p_static_w + 2 * c.p_clock_w_per_ghz


def test_another_llm_brings_the_format_that_it_is_published_in():
    """Through every way of changing an LLM; a format that was chosen stays."""
    spec = InstanceSpec()
    assert spec.changed(llm="gpt-oss-20b", tp=1).dtype == "mxfp4"
    assert spec.changed(llm="gpt-oss-20b", tp=1).changed(llm="llama-3.1-8b").dtype == "bf16"
    assert spec.changed(dtype="fp8").changed(llm="qwen3-32b").dtype == "fp8"
    assert spec.changed(llm="gpt-oss-20b", dtype="bf16").dtype == "bf16"
    scenario = load_scenario("synthetic")
    assert scenario.changed(llm="gpt-oss-120b", tp=1).dtype == "mxfp4"
    assert scenario.changed(llm="gpt-oss-120b", tp=1).changed(llm="qwen3-8b").dtype == "bf16"
    assert scenario.changed(dtype="fp8").changed(llm="qwen3-32b").dtype == "fp8"
    config = load_named("agents", "prefill-ppo", AgentConfig)
    assert config.changed(llm="gpt-oss-20b", tp=1).dtype == "mxfp4"
