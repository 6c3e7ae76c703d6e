"""The profiler: shapes of a shard, its arithmetic against plain attention, the table that the fit
reads. On the CPU, tiny.
"""

import math

import numpy as np
import pandas as pd
import pytest
import yaml
from hardware_helpers import gpus_of
from toy_hardware import TOY, TOY_LLM
from typer.testing import CliRunner

from biscale_env.cli import build
from biscale_env.config import InstanceSpec, load_llm
from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks.fake_gpus import FakeBackend, create_state
from biscale_env.hardware.profile import profiler
from biscale_env.hardware.profile.profiler import (
    ProfilePoint,
    Profiler,
    ProfileSettings,
    decode_points,
    predictions,
    prefill_points,
    write_table,
)
from biscale_env.models import load_model
from biscale_env.models.fit.profile_table import read_profile

torch = pytest.importorskip("torch")
from biscale_env.hardware.profile.shard import Shard, ShardShape  # noqa: E402

pytest_plugins = ["hardware_fixtures"]
TINY = load_llm().model_copy(
    update={
        "name": "tiny",
        "layers": 2,
        "hidden": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "intermediate": 48,
        "vocabulary": 64,
    }
)


def quick(**changes):
    return ProfileSettings(**{"device": "cpu", "warm_s": 0.0, "measure_s": 0.0, **changes})


@pytest.mark.parametrize("tp", [4, 8])
def test_a_shard_of_llama_70b_holds_its_share_of_the_weights(tp):
    llm = load_llm()
    shape = ShardShape.of(llm, tp)
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads) == (
        80,
        8192,
        64 // tp,
        8 // tp,
    )
    embedding = (
        llm.vocabulary * llm.hidden
    )  # looked up, not multiplied: no part of the shard's GEMMs
    assert shape.weight_count * tp == pytest.approx(llm.parameters - embedding, rel=0.01)


def test_shapes_that_do_not_divide_are_refused():
    with pytest.raises(BiscaleError, match="TP 3"):
        ShardShape.of(load_llm(), 3)


def plain_logits(shard, tokens):
    """The same network written out for one sequence without cache, in float64."""
    s = shard.shape
    x = tokens.double()

    def norm(y):
        return y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-5)

    n = len(x)
    for qkv, out, up, down in shard.layers:
        q, k, v = (norm(x) @ qkv.double().T).split(
            [s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim], -1
        )
        heads = []
        for h in range(s.heads):
            group = h * s.kv_heads // s.heads
            qh = q[:, h * s.head_dim : (h + 1) * s.head_dim]
            kh, vh = (t[:, group * s.head_dim : (group + 1) * s.head_dim] for t in (k, v))
            scores = (qh @ kh.T) / math.sqrt(s.head_dim)
            scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -math.inf)
            heads.append(scores.softmax(-1) @ vh)
        x = x + torch.cat(heads, -1) @ out.double().T
        gate, raised = (norm(x) @ up.double().T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * raised) @ down.double().T
    return norm(x[-1]) @ shard.head.double().T


def test_the_shard_computes_a_transformer_whole_chunked_and_token_by_token():
    shard = Shard(ShardShape.of(TINY, 1), "cpu", torch.float32)
    tokens = torch.randn(9, 32)
    want = plain_logits(shard, tokens).float()
    cache = shard.cache(1, 9)
    whole = shard.iteration(tokens, 1, cache, 0)[0]
    assert torch.allclose(whole, want, atol=1e-4)
    cache = shard.cache(1, 9)
    shard.iteration(tokens[:4], 1, cache, 0)
    assert torch.allclose(
        shard.iteration(tokens[4:], 1, cache, 4)[0], want, atol=1e-4
    )  # a chunk behind a prefix
    cache = shard.cache(1, 9)
    for k in range(9):
        last = shard.iteration(tokens[k : k + 1], 1, cache, k)[0]
    assert torch.allclose(last, want, atol=1e-4)  # decode


def test_a_batch_is_its_sequences_side_by_side():
    shard = Shard(ShardShape.of(TINY, 2), "cpu", torch.float32)
    a, b = torch.randn(5, 32), torch.randn(5, 32)
    both = shard.iteration(torch.cat([a, b]), 2, shard.cache(2, 5), 0)
    alone = [shard.iteration(x, 1, shard.cache(1, 5), 0)[0] for x in (a, b)]
    assert torch.allclose(both, torch.stack(alone), atol=1e-4)


@pytest.mark.parametrize("make", [prefill_points, decode_points])
def test_grids_have_enough_points_for_a_fit(make):
    full, coarse = make(4), make(4, quick=True)
    assert len(full) > len(coarse) >= 8
    assert len(set(full)) == len(full)


def test_a_table_that_the_fit_reads(tmp_path):
    points = [
        ProfilePoint("prefill", 1, 1, 16, 0, 0),
        ProfilePoint("prefill", 1, 2, 8, 4, 0),
        ProfilePoint("decode", 1, 3, 0, 0, 20),
    ]
    machine = Profiler(quick(), None, llm=TINY)
    rows = list(machine.measure(points))
    assert [r["latency_s"] > 0 for r in rows] == [True] * 3
    write_table(tmp_path / "p.csv", rows, profiler.provenance(machine))
    prefill_table, decode_table = sorted(
        read_profile(tmp_path / "p.csv"), key=lambda t: t.phase, reverse=True
    )
    assert prefill_table.work.tokens.tolist() == [16.0, 16.0]
    assert decode_table.work.cached.tolist() == [60.0]
    assert "power_w" not in decode_table.rows
    about = yaml.safe_load((tmp_path / "p.yaml").read_text())
    assert "rehearsal" in about["device"]
    assert about["clocks"] == "default, never touched"


def test_the_shapes_are_those_of_the_named_llm():
    machine = Profiler(quick(llm=TOY_LLM), None)
    assert machine.llm == load_llm(TOY_LLM)
    assert ShardShape.of(machine.llm, 2).hidden == 4096
    assert profiler.provenance(machine)["llm"] == "toy-9b"


def test_a_sweep_goes_through_degrees_and_phases():
    both = profiler.grid_points([2, 4])
    assert both == [p for tp in (2, 4) for p in prefill_points(tp) + decode_points(tp)]
    decode = profiler.grid_points([2, 4], "decode", quick=True)
    assert decode == decode_points(2, True) + decode_points(4, True)
    tiny = profiler.grid_points([4], "prefill", miniature=True)
    assert {(p.phase, p.tp) for p in tiny} == {("prefill", 4)}


def test_fewer_layers_are_scaled_up():
    half = Profiler(quick(layers=1), None, llm=TINY)
    assert half._shard(1).shape.layers == 1
    row = next(iter(half.measure([ProfilePoint("decode", 1, 1, 0, 0, 4)])))
    assert row["latency_s"] > 0


def test_power_comes_from_the_energy_counter_and_the_clock_from_read_back(tmp_path):
    backend = FakeBackend(create_state(tmp_path / "gpus", 1, delay_s=0.0))
    machine = Profiler(quick(measure_s=0.3), backend, llm=TINY)
    row = next(iter(machine.measure([ProfilePoint("decode", 1, 1, 0, 0, 4)])))
    assert row["power_w"] == pytest.approx(100.0 + 50.0 * 1.98**3, rel=0.02)
    assert row["freq_mhz"] == 1980.0
    gpu = gpus_of(tmp_path / "gpus")[0]
    assert gpu["n_sets"] + gpu["n_resets"] == 0  # the default never touches the clock


def test_asked_for_clocks_are_locked_in_turn_and_reset(tmp_path, hw_state):
    backend = FakeBackend(create_state(tmp_path / "gpus", 1, delay_s=0.0))
    machine = Profiler(quick(measure_s=0.1, clocks_mhz=(900.0, 1500.0)), backend, llm=TINY)
    rows = list(machine.measure([ProfilePoint("decode", 1, 1, 0, 0, 4)]))
    assert [r["freq_mhz"] for r in rows] == [900.0, 1500.0]
    assert gpus_of(tmp_path / "gpus")[0]["locked"] == 0
    assert not list(hw_state.glob("*.json"))


def test_an_interrupted_sweep_resets_the_clock(tmp_path, hw_state):
    backend = FakeBackend(create_state(tmp_path / "gpus", 1, delay_s=0.0))
    machine = Profiler(quick(clocks_mhz=(900.0,)), backend, llm=TINY)
    sweep = machine.measure([ProfilePoint("decode", 1, 1, 0, 0, 4)] * 3)
    next(sweep)
    assert gpus_of(tmp_path / "gpus")[0]["locked"] == 1
    sweep.close()
    assert gpus_of(tmp_path / "gpus")[0]["locked"] == 0
    assert not list(hw_state.glob("*.json"))


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu_goes_all_the_way_to_the_fit(tmp_path, hw_state):
    """`biscale profile --tiny`, then `biscale fit --profile`.

    The two commands a user of real GPUs runs, with fake clocks.
    """
    gpus = create_state(tmp_path / "gpus", 1, delay_s=0.0)
    table = tmp_path / "p.csv"
    arguments = [
        "profile",
        "--device",
        "cpu",
        "--tiny",
        "--tp",
        "4",
        "--phase",
        "decode",
        "--clocks",
        "900,1980",
    ]
    done = CliRunner().invoke(
        build(), [*arguments, "--backend", f"fake:{gpus}", "--out", str(table)]
    )
    assert done.exit_code == 0, (done.output, done.exception)
    assert "rehearsal" in table.read_text().splitlines()[0]
    (decode,) = read_profile(table)
    assert decode.shard  # so the fit keeps all-reduce and host
    assert set(decode.rows["freq_mhz"]) == {900.0, 1980.0}
    fitted = CliRunner().invoke(
        build(), ["fit", "--profile", str(table), "--out", str(tmp_path / "mine")]
    )
    assert fitted.exit_code == 0, (fitted.output, fitted.exception)
    model, shipped = load_model("decode", 4, name=str(tmp_path / "mine")), load_model("decode", 4)
    assert model.coefficients.comm0_s == shipped.coefficients.comm0_s
    assert model.coefficients.weights_s != shipped.coefficients.weights_s
    assert gpus_of(gpus)[0]["locked"] == 0


def test_the_command_without_a_gpu_says_how_to_rehearse(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, said in (([], "--device cpu --tiny"), (["--device", "cpu"], "add --tiny")):
        done = CliRunner().invoke(build(), ["profile", *words])
        assert isinstance(done.exception, BiscaleError)
        assert said in str(done.exception)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"clocks_mhz": (900.0,)}, "never touches"),
        ({"repeats": 5}, "32 repetitions"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, words):
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(BiscaleError, match=words):
        Profiler(quick(**settings), None, llm=TINY)


def test_predictions_leave_out_what_one_gpu_cannot_show():
    frame = pd.DataFrame(
        [
            {
                "phase": "decode",
                "tp": 4,
                "dtype": "bf16",
                "batch": 64,
                "new_tokens": 0,
                "prefix": 0,
                "context": 1024,
                "freq_mhz": 1980.0,
            },
            {
                "phase": "prefill",
                "tp": 4,
                "dtype": "bf16",
                "batch": 1,
                "new_tokens": 2048,
                "prefix": 0,
                "context": 0,
                "freq_mhz": math.nan,
            },
        ]
    )
    said = predictions(frame)
    decode, prefill = load_model("decode", 4), load_model("prefill", 4)
    c = decode.coefficients
    whole = float(decode.latency_s(64, 0, 64 * 1024, 64, 1980.0))
    assert said["latency_s"][0] == pytest.approx(
        whole - c.comm0_s - c.comm_s_per_token * 64 - c.host0_s - c.host_s_per_seq * 64, rel=1e-6
    )
    assert said["latency_s"][1] < float(prefill.latency_s(2048, 2048 * 1024, 0, 1, 1980.0))
    toy = predictions(frame.assign(freq_mhz=1200.0), InstanceSpec(**TOY))
    assert (toy["latency_s"] != said["latency_s"]).all()
    assert (toy["power_w"] < 250.0 * (1 + 1e-9)).all()
    faster = predictions(frame, hbm_ratio=4.8 / 3.35)
    assert faster["latency_s"][0] < 0.85 * said["latency_s"][0]
    assert np.isfinite(said.to_numpy()).all()
