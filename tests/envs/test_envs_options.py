"""Options of the environments: what they do, and one sentence for each mistake."""

from typing import Any

import numpy as np
import pytest

from biscale_env.config import Slo, load_slo
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.loads.workloads import WorkloadSource, trace_windows
from biscale_env.envs.options import make_options
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.envs.single import DecodeEnv, PrefillEnv
from biscale_env.traces import Trace

SMALL: dict[str, Any] = {"rate_rps": 4.0, "episode_s": 5.0}


def made(n: int, duration_s: float, seed: int = 0, prompt: int = 300, output: int = 20) -> Trace:
    rng = np.random.default_rng(seed)
    return Trace(
        "made",
        np.sort(rng.uniform(0, duration_s, n)),
        np.full(n, prompt),
        np.full(n, output),
        "test",
        duration_s=duration_s,
    )


MISTAKES = {
    "unknown option": ({"slow": 1}, "unexpected keyword argument 'slow'"),
    "nearest option": ({"token_budgett": 1}, "nearest option is 'token_budget'"),
    "zero load": ({"load": 0.0, "rate_rps": None}, "load must be a positive fraction"),
    "negative load": ({"load": -1.0, "rate_rps": None}, "load must be a positive fraction"),
    "NaN load": ({"load": float("nan"), "rate_rps": None}, "load must be a positive fraction"),
    "both loads": ({"load": 0.5}, "either load or rate_rps"),
    "zero rate": ({"rate_rps": 0.0}, "rate_rps must be a positive number"),
    "NaN rate": ({"rate_rps": float("nan")}, "rate_rps must be a positive number"),
    "no episode": ({"episode_s": 0.0}, "episode_s must be a positive number"),
    "no workloads": ({"n_workloads": 0}, "n_workloads must be at least 1"),
    "negative delay": ({"actuation_delay_s": -0.1}, "actuation_delay_s"),
    "infinite delay": ({"actuation_delay_s": float("inf")}, "actuation_delay_s"),
    "negative interval": ({"min_decision_interval_s": -1.0}, "min_decision_interval_s"),
    "no budget": ({"token_budget": 0}, "token_budget"),
    "no requests": ({"max_seqs": 0}, "max_seqs"),
    "full watermark": ({"kv_watermark": 1.0}, "kv_watermark"),
    "unknown SLO": ({"slo": "fast"}, "unknown slo 'fast'"),
    "unknown GPU": ({"gpu": "h200"}, "unknown gpu 'h200'"),
    "unknown model": ({"model": "gpt"}, "unknown model 'gpt'"),
    "unknown dtype": ({"dtype": "int4"}, "dtype"),
    "TP without a model": ({"tp": 3}, "TP 3"),
    "TP that does not fit": (
        {"tp": 2, "dtype": "bf16"},
        "does not fit on TP 2|has no (prefill|decode) model for bf16 at TP 2",
    ),
    "negative TP": ({"tp": -4}, "tp"),
    "unknown member": ({"ensemble_member": 10**6}, "ensemble member 1000000 does not exist"),
    "negative member": ({"ensemble_member": -7}, "ensemble member -7 does not exist"),
    "odd member": ({"ensemble_member": "often"}, "ensemble_member"),
    "unknown profile": ({"profile": "nothing-like"}, "nothing-like"),
    "missing trace": ({"trace": "no/such/file.csv"}, "no/such/file.csv"),
}


@pytest.mark.parametrize("env", [PrefillEnv, DecodeEnv])
@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(env: type, case: str) -> None:
    options, words = MISTAKES[case]
    with pytest.raises(BiscaleError, match=words) as caught:
        env(**{**SMALL, **options}).reset(seed=0)
    text = str(caught.value)
    assert "\n" not in text
    assert "pydantic" not in text.lower()


def test_unknown_phase() -> None:
    with pytest.raises(BiscaleError, match="phase"):
        make_options("train", **SMALL)


@pytest.mark.parametrize("env", [PrefillEnv, DecodeEnv])
def test_prompt_longer_than_the_kv_room(env: type) -> None:
    """Named with trace, request and field, in both phases."""
    trace = Trace(
        "odd",
        np.array([0.0, 1.0]),
        np.array([100, 2_000_000]),
        np.array([5, 5]),
        "test",
        duration_s=5.0,
    )
    with pytest.raises(BiscaleError, match=r"request 1: prompt_tokens 2000000.*KV room"):
        env(trace=trace, rate_rps=0.4, episode_s=5.0).reset(seed=0)


def test_decode_counts_the_output_against_the_room() -> None:
    """A prompt that fits alone but not with its answer can be prefilled, not decoded."""
    room = Plant(PlantSettings.of("decode")).kv_capacity_tokens
    trace = Trace(
        "odd", np.array([0.0]), np.array([room - 10]), np.array([11]), "test", duration_s=5.0
    )
    RequestTable.of(Plant(PlantSettings.of("prefill")), [trace])
    with pytest.raises(BiscaleError, match="do not fit"):
        RequestTable.of(Plant(PlantSettings.of("decode")), [trace])
    fits = Trace(
        "exact", np.array([0.0]), np.array([room - 10]), np.array([10]), "test", duration_s=5.0
    )
    plant = Plant(PlantSettings.of("decode", drain=True))
    batch = Batch(plant, 1, RequestTable.of(plant, [fits]))
    zero = np.zeros(1, dtype=np.int64)
    batch.reset(zero, zero, zero - 1)
    while not batch.done[0]:
        batch.step(np.ones(1, dtype=np.float32))
    assert batch.states[0]["finished"] == 1


def test_empty_workload_is_refused() -> None:
    plant = Plant(PlantSettings.of("decode"))
    with pytest.raises(BiscaleError, match="no requests"):
        RequestTable.of(
            plant,
            [
                Trace(
                    "single", np.array([0.0]), np.array([5]), np.array([1]), "test", duration_s=1.0
                )
            ],
        )
    with pytest.raises(BiscaleError, match="no requests"):
        RequestTable.of(plant, [])


def test_slo_of_zero_is_refused(tmp_path: Any) -> None:
    file = tmp_path / "zero.yaml"
    file.write_text("name: zero\nttft_s: 0\ntpot_s: 0.1\nattainment: 0.99\n")
    with pytest.raises(BiscaleError, match=r"zero\.yaml: 'ttft_s'"):
        PrefillEnv(slo=str(file), **SMALL)


def test_slo_object_name_and_file_agree(tmp_path: Any) -> None:
    """However it is given, the SLO is what the observation and the cost use."""
    mine = load_slo("biscale").model_copy(update={"name": "mine", "ttft_s": 0.123})
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nttft_s: 0.123\ntpot_s: 0.1\nattainment: 0.99\n")
    for slo in (mine, str(file)):
        env = PrefillEnv(slo=slo, **SMALL)
        obs, _ = env.reset(seed=0)
        assert float(env.plant.spec.value(obs, "slo")) == pytest.approx(0.123)
        assert env.plant.slo.name == "mine"


def test_settings_reach_the_engine() -> None:
    env = DecodeEnv(
        max_seqs=7,
        kv_watermark=0.2,
        actuation_delay_s=0.123,
        min_decision_interval_s=0.4,
        violation_weight=3.0,
        tp=8,
        **SMALL,
    )
    env.reset(seed=0)
    params = env._batch.params[0]
    expected = {
        "max_seqs": 7, "kv_watermark": 0.2, "delay_s": 0.123, "min_interval_s": 0.4,
        "violation_weight": 3.0, "slo_s": 0.1, "end_s": 5.0, "freq_min_ghz": 0.51,
        "freq_max_ghz": 1.98, "freq_step_ghz": 0.015, "drain": 0,
    }  # fmt: skip
    assert {k: float(params[k]) for k in expected} == pytest.approx(expected)
    assert env._batch.coefs[0]["n_gpus"] == 8
    assert float(params["kv_capacity"]) == env.plant.model.kv_capacity_tokens


def test_kv_room_matches_the_known_figures() -> None:
    """406k tokens for bf16 TP4, 1.24M for TP8, 393k / 1.23M / 2.9M for fp8 TP2 / TP4 / TP8, as
    facts give them.
    """
    known = {
        ("bf16", 4): 406e3,
        ("bf16", 8): 1.24e6,
        ("fp8", 2): 393e3,
        ("fp8", 4): 1.23e6,
        ("fp8", 8): 2.9e6,
    }
    for (dtype, tp), tokens in known.items():
        room = Plant(PlantSettings.of("decode", tp=tp, dtype=dtype)).kv_capacity_tokens
        assert room == pytest.approx(tokens, rel=0.01), (dtype, tp)


def test_workload_k_is_always_the_same() -> None:
    """Two sources made alike give the same workloads in any order; another root gives others."""
    trace = made(2000, 500.0)
    one, two = (WorkloadSource(trace_windows(trace), 2.0, 20.0, seed=3) for _ in range(2))
    backwards = [two.workload(k) for k in reversed(range(5))][::-1]
    for k in range(5):
        assert one.workload(k) == backwards[k]
    assert one.workload(0) != one.workload(1)
    assert WorkloadSource(trace_windows(trace), 2.0, 20.0, seed=4).workload(0) != one.workload(0)


def test_windows_meet_the_rate_on_average_and_fit_the_episode() -> None:
    trace = made(4000, 1000.0)
    source = WorkloadSource(trace_windows(trace), 2.0, 20.0)
    windows = [source.workload(k) for k in range(300)]
    assert all(w.duration_s == pytest.approx(20.0) for w in windows)
    counts = np.array([len(w) for w in windows])
    error = counts.std(ddof=1) / np.sqrt(len(counts))
    assert abs(counts.mean() - 40.0) < 4 * error + 0.1


def test_empty_windows_are_passed_over_and_then_refused() -> None:
    lonely = Trace(
        "lonely", np.array([500.0]), np.array([10]), np.array([5]), "test", duration_s=1000.0
    )
    with pytest.raises(BiscaleError, match="no request within"):
        WorkloadSource(trace_windows(lonely), 1e-9, 0.001).workload(0)


@pytest.mark.slow
def test_load_is_a_share_of_the_capacity() -> None:
    half, full = (make_options("prefill", load=share, n_workloads=2) for share in (0.5, 1.0))
    assert half.source.rate_rps == pytest.approx(0.5 * full.source.rate_rps, rel=1e-12)


def test_a_slo_that_nothing_meets_is_said() -> None:
    slo = Slo(name="impossible", ttft_s=1e-4, tpot_s=1e-4, attainment=0.99)
    with pytest.raises(BiscaleError, match="not even a small load meets SLO 'impossible'"):
        make_options("prefill", trace=made(300, 100.0), slo=slo)
