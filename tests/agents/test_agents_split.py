"""What agents are trained on, what is held out from that, and what tables are made of.

Three sets of workloads that do not mix.
"""

import numpy as np
import pytest
from cli_in_process import caller

pytest.importorskip("stable_baselines3")

from agents.training.heldout import HeldOut
from agents.training.train_config import AgentConfig, load_config
from agents.training.worlds.mixture import HELD_OUT, TRAINED_FRACTION, make_groups
from agents.training.worlds.training_env import AgentVecEnv
from biscale_env.config.loader import list_names, load_named
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.rollouts.scenarios import Scenario, load_scenario
from biscale_env.traces import Trace, write_trace

SHOWN_TOKENS = (
    500  # prompts of the part that tables are made of are longer than this, all others shorter
)


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    """A trace whose two halves are told apart by their prompts."""
    rng, n = np.random.default_rng(0), 3000
    arrival_s = np.sort(rng.uniform(0.0, 1000.0, n))
    first = arrival_s < Scenario(name="default").tune_fraction * arrival_s[-1]
    prompt = np.where(
        first, rng.integers(100, SHOWN_TOKENS, n), rng.integers(SHOWN_TOKENS + 1, 900, n)
    )
    path = tmp_path_factory.mktemp("trace") / "halves.csv"
    return write_trace(
        Trace("halves", arrival_s, prompt.astype(np.int32), np.full(n, 20, np.int32), "test"), path
    )


def config_of(phase, **part):
    part = {"rates_rps": [2.0], "workloads": 3, "episode_s": 60.0} | part
    return AgentConfig.model_validate(
        {"phase": phase, "n_envs": 4, "mixture": [part], "action": "clock"}
    )


@pytest.mark.parametrize("episode_s", [60.0, 5000.0])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_training_and_held_out_windows_stay_out_of_the_half_that_tables_show(
    phase, episode_s, trace_file
):
    config = config_of(phase, trace=str(trace_file), episode_s=episode_s)
    groups, counts = make_groups(config)
    for held_out in (False, True):
        prompts = AgentVecEnv(config, groups, counts, 0, held_out).workloads.table.prompt
        assert len(prompts) > 100
        assert prompts.max() < SHOWN_TOKENS
    assert HeldOut(config, groups, 2)._pool.prompt.max() < SHOWN_TOKENS


def test_half_of_a_trace_is_trained_on():
    """Not more, which the test above shows, and not less: the rest is lost for nothing."""
    shipped = [load_scenario(name) for name in list_names("scenarios")]
    assert {s.tune_fraction for s in shipped if s.trace} == {TRAINED_FRACTION}


def requests_of(pool):
    """The workloads of a pool as sets of (arrival, prompt, output)."""
    rows = list(
        zip(pool.arrival_s.tolist(), pool.prompt.tolist(), pool.output.tolist(), strict=True)
    )
    return [set(rows[begin:end]) for begin, end in zip(pool.begins, pool.ends, strict=True)]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_generated_held_out_workloads_share_no_request_with_those_of_training(phase):
    config = config_of(phase)
    groups, counts = make_groups(config)
    trained = set.union(*requests_of(AgentVecEnv(config, groups, counts, 0).workloads.table))
    for pool in (
        AgentVecEnv(config, groups, counts, 0, held_out=True).workloads.table,
        HeldOut(config, groups, 3)._pool,
    ):
        assert not trained & set.union(*requests_of(pool))


@pytest.mark.parametrize("name", sorted(set(list_names("agents")) - {"cluster", "multi"}))
def test_the_workloads_of_a_shipped_run_end_before_the_held_out_ones(name):
    config = load_named("agents", name, AgentConfig)
    assert max(part.workloads for part in config.mixture) < HELD_OUT


@pytest.mark.parametrize(
    ("given", "left_out"),
    [
        ({}, []),
        ({"llm": "qwen3-32b"}, ["llama-3.1-8b-tp1", "gpt-oss-20b-tp1"]),
        ({"gpu": "h100-sxm"}, ["mlperf-server-a100-sxm", "b200-sxm-tp2"]),
        (
            {"llm": "qwen3-32b", "gpu": "h100-sxm", "tp": 2},
            [
                "tp8",
                "llama-3.1-8b-tp1",
                "gpt-oss-20b-tp1",
                "mlperf-server-a100-sxm",
                "b200-sxm-tp2",
            ],
        ),
        ({"idle": "last-clock"}, ["parked"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_an_instance_that_is_asked_for_is_the_one_trained_on(phase, given, left_out):
    shipped = load_config(None, phase)
    narrowed, out = shipped.changed(**given).trained_on(given)
    assert out == left_out
    assert len(narrowed.mixture) == len(shipped.mixture) - len(left_out)
    for part in narrowed.mixture:
        instance = part.instance_of(narrowed.instance)
        assert {key: getattr(instance, key) for key in given} == given


def test_a_mixture_without_the_instance_asked_for_is_refused():
    config = config_of("decode", llm="qwen3-32b", tp=2)
    assert config.trained_on({"llm": "qwen3-32b", "tp": None}) == (config, [])
    with pytest.raises(BiscaleError, match="names another instance than tp 4"):
        config.trained_on({"tp": 4})


def test_the_command_trains_on_the_instance_asked_for(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "agents.training.many_seeds.train_seed", lambda mine, *_, **__: seen.append(mine) or "done"
    )
    call = caller(capsys, monkeypatch, tmp_path, "train", "decode", "--out", "here")
    code, out, _ = call("--llm", "qwen3-32b", "--gpu", "h100-sxm", "--tp", "2")
    assert code == 0
    assert "left out: tp8, llama-3.1-8b-tp1," in out
    trained = [part.instance_of(seen[0].instance) for part in seen[0].mixture]
    assert {(s.llm, s.gpu, s.tp, s.dtype) for s in trained} == {
        ("qwen3-32b", "h100-sxm", 2, "bf16")
    }
    assert "left out" not in call()[1]
