"""Configuration files: every shipped one loads, and each kind of mistake is one sentence."""

import math
from pathlib import Path

import numpy as np
import pytest

from biscale_env.config import (
    Gpu,
    Slo,
    configs_dir,
    list_names,
    load_gpu,
    load_llm,
    load_slo,
    load_yaml,
)
from biscale_env.config.loader import load_named
from biscale_env.config.slo import within
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.experiments import load_experiment
from biscale_env.evaluation.experiment.policy_list import choose
from biscale_env.evaluation.rollouts.scenarios import load_scenario

SLO = "name: x\nttft_s: 0.6\ntpot_s: 0.1\nattainment: 0.99\n"


def test_every_shipped_file_loads() -> None:
    for name in list_names("slos"):
        assert load_slo(name).name == name
    for name in list_names("gpus"):
        assert load_gpu(name).name == name
    for name in list_names("llms"):
        assert load_llm(name).name == name
    assert {"biscale", "mlperf-interactive", "mlperf-server", "distserve"} <= set(
        list_names("slos")
    )


@pytest.mark.parametrize("name", list_names("experiments"))
def test_every_experiment_names_policies_and_scenarios_that_exist(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    assert experiment.about
    # a generated workload has no halves to be exchanged
    halved = [load_scenario(workload).trace is not None for workload in experiment.workloads]
    ways = [len(experiment.folds) if of_a_trace else 1 for of_a_trace in halved]
    varied = (
        experiment.idles,
        experiment.means,
        experiment.loads,
        experiment.slos,
        experiment.delays_s,
    )
    assert len(experiment.scenarios()) == sum(ways) * math.prod(map(len, varied))
    assert set(experiment.oracle_seeds_by_phase) == set(experiment.phases)
    assert all(0 <= n <= experiment.seeds for n in experiment.oracle_seeds_by_phase.values())
    if name == "main":  # every row of its table stands on the same workloads
        assert set(experiment.oracle_seeds_by_phase.values()) == {experiment.seeds}
    for pairs in choose(experiment.policies, experiment.phases).values():
        assert len(pairs) >= 3


def test_the_full_cross_covers_slos_delays_and_members() -> None:
    full = load_experiment("full")
    of_one_class = {name for name in list_names("slos") if not load_slo(name).classes}
    assert set(full.slos) == of_one_class
    assert set(full.delays_s) == {0.0, 0.01, 0.05, 0.1, 0.2}
    assert -1 in full.members
    assert len(full.members) > 3


def test_slos_are_those_of_the_papers() -> None:
    known = {
        "biscale": (0.6, 0.1, 0.99),
        "mlperf-interactive": (0.45, 0.04, 0.99),
        "mlperf-server": (2.0, 0.2, 0.99),
    }
    for name, values in known.items():
        slo = load_slo(name)
        assert (slo.ttft_s, slo.tpot_s, slo.attainment, slo.statistic) == (*values, "each")
        assert slo.source
    distserve = load_slo("distserve")
    assert (distserve.ttft_s, distserve.tpot_s, distserve.attainment, distserve.statistic) == (
        0.4,
        0.1,
        0.9,
        "joint",
    )


def test_gpu_and_llm_are_those_of_the_data_sheets() -> None:
    gpu, llm = load_gpu(), load_llm()
    assert (gpu.freq_max_mhz, gpu.freq_step_mhz, gpu.power_cap_w, gpu.memory_gb) == (
        1980,
        15,
        700,
        80,
    )
    assert len(gpu.control_levels_mhz) == 7
    assert gpu.peak_bf16_tflops == pytest.approx(132 * 4096 * 1.83e9 / 1e12, rel=0.001)
    assert llm.kv_bytes_per_token("bf16") == 327_680
    assert llm.kv_bytes_per_token("fp8") == 163_840
    h, i, kv = llm.hidden, llm.intermediate, llm.kv_heads * llm.head_dim
    counted = llm.layers * (2 * h * h + 2 * h * kv + 3 * h * i) + 2 * llm.vocabulary * h
    assert llm.parameters == pytest.approx(counted, rel=0.001), "geometry and parameter count agree"


@pytest.mark.parametrize(("dtype", "tp"), [("bf16", 1), ("bf16", 2), ("fp8", 1)])
def test_a_tp_that_does_not_fit(dtype: str, tp: int) -> None:
    with pytest.raises(BiscaleError, match=f"does not fit on TP {tp}"):
        load_llm().kv_capacity_tokens(load_gpu(), tp, dtype)  # type: ignore[arg-type]


def test_attainment_counts_the_unfinished_as_missed() -> None:
    slo = load_slo()
    assert slo.attained(np.array([0.6, 0.61, np.nan, 0.1]), "prefill") == 0.5
    assert slo.attained(np.array([0.1, 0.11]), "decode") == 0.5
    assert slo.attained(np.array([]), "prefill") == 1.0
    assert slo.bound_s("prefill") == 0.6
    assert slo.bound_s("decode") == 0.1


def test_a_bound_is_kept_up_to_rounding_and_not_by_the_unfinished() -> None:
    assert 1.6 - 1.0 > 0.6  # what the nanosecond is for
    assert within([1.6 - 1.0, 0.6 + 5e-10, 0.6 + 2e-9, np.nan], 0.6).tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert load_slo().attained(np.array([1.6 - 1.0]), "prefill") == 1.0


BAD = {
    "unknown key": (SLO + "tpot: 1\n", "unknown key 'tpot'; the nearest known key is 'tpot_s'"),
    "zero": (SLO.replace("0.6", "0"), "'ttft_s' = 0"),
    "negative": (SLO.replace("0.1", "-0.1"), "'tpot_s' = -0.1"),
    "NaN": (SLO.replace("0.6", ".nan"), "'ttft_s' = nan"),
    "text": (SLO.replace("0.6", "fast"), "'ttft_s' = 'fast'"),
    "missing": ("name: x\nttft_s: 1\ntpot_s: 1\n", "'attainment'"),
    "share above one": (SLO.replace("0.99", "99"), "'attainment' = 99"),
    "a list": ("- 1\n- 2\n", "expected a mapping"),
    "empty": ("", "expected a mapping"),
    "not YAML": ("name: [x\n", "not valid YAML at line"),
    "code": ("name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_sentence_naming_it(tmp_path: Path, case: str) -> None:
    text, words = BAD[case]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(BiscaleError) as caught:
        load_slo(str(file))
    message = str(caught.value)
    assert words in message
    assert str(file) in message
    assert "\n" not in message


def test_a_name_that_does_not_exist_lists_the_known_ones() -> None:
    with pytest.raises(BiscaleError, match=r"unknown slo 'mlperf'; known: biscale, distserve"):
        load_slo("mlperf")
    with pytest.raises(BiscaleError, match="unknown gpu 'a100'"):
        load_named("gpus", "a100", Gpu)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(BiscaleError, match="cannot read"):
        load_yaml(tmp_path / "no.yaml", Slo)
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BiscaleError, match="not UTF-8"):
        load_yaml(tmp_path / "bin.yaml", Slo)


def test_gpu_clocks_must_be_in_order(tmp_path: Path) -> None:
    text = (configs_dir() / "gpus" / "h100-sxm.yaml").read_text()
    for old, new, words in (
        ("freq_min_mhz: 510", "freq_min_mhz: 2000", "below"),
        ("[810, 1005", "[1005, 810", "rise"),
        ("1800, 1980]", "1800, 2100]", "within"),
    ):
        file = tmp_path / "gpu.yaml"
        file.write_text(text.replace(old, new))
        with pytest.raises(BiscaleError, match=words):
            load_gpu(str(file))


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_slo().ttft_s = 1.0  # type: ignore[misc]
    with pytest.raises(BiscaleError, match="impossible"):
        load_gpu().check_clock(2000.0)
    assert load_gpu().check_clock(1200) == 1200.0


def test_a_mistake_that_concerns_a_whole_file_does_not_repeat_the_file(tmp_path: Path) -> None:
    text = (configs_dir() / "gpus" / "h100-sxm.yaml").read_text()
    (tmp_path / "x.yaml").write_text(text.replace("freq_min_mhz: 510", "freq_min_mhz: 5100"))
    with pytest.raises(BiscaleError, match="freq_min_mhz must lie below freq_max_mhz") as error:
        load_gpu(str(tmp_path / "x.yaml"))
    assert len(str(error.value)) < 300
