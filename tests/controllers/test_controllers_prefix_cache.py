"""Controllers with a prefix cache: what they predict is what is really computed."""

import numpy as np
import pytest
from block_helpers import with_blocks
from oracle_helpers import ROW, plant_of, trace_of

from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.models import physics
from controllers import make_policy
from controllers.base import context_of


def chat(n=60, seed=3):
    """Requests that share first blocks of 256 tokens, some of them waiting behind each other."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(300, 6000, n)
    gaps = rng.choice([0.0, 0.05, 0.4, 2.0], n)
    contents = [rng.integers(0, 2, 5).tolist() for _ in range(n)]
    return with_blocks(trace_of(gaps, prompts, tail_s=1.0), contents, 256)


def decisions(policy, plant, trace):
    """Observation, action and record of every decision of an episode."""
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]))
    batch.reset(ROW, ROW, np.array([-1]))
    state, start = None, np.ones(1, dtype=bool)
    while not batch.done[0]:
        obs = batch.obs.copy()
        action, state = policy.predict(obs, state, start)
        batch.step(np.asarray(action, dtype=np.float32).reshape(1))
        start = np.zeros(1, dtype=bool)
        yield obs, float(np.ravel(action)[0]), batch.states[0]


def test_the_mpc_predicts_every_batch_exactly():
    plant = plant_of("prefill", prefix_cache="lru:20000", actuation_delay_s=0.0)
    trace = chat()
    hits = RequestTable.of(plant, [trace]).prefix
    assert 0.2 < (hits > 0).mean() < 1.0
    policy = make_policy("mpc", context_of(plant))
    c = plant.model.member(-1)
    seen = 0
    for obs, action, record in decisions(policy, plant, trace):
        stage = policy.problem.stages(obs.astype(np.float64) * plant.spec.scale)[0, 0]
        freq = float(plant.clocks.snap_mhz(plant.clocks.to_freq_mhz(action))) / 1e3
        freq = min(freq, float(stage["cap_ghz"]))
        work = (float(stage["tokens"]), float(stage["attn_work"]), 0.0, float(stage["n_seq"]))
        predicted_s = float(physics.latency_s(c, *work, freq))
        assert predicted_s == pytest.approx(record["last_time_s"], rel=2e-6)
        seen += 1
    assert seen > 40


@pytest.mark.parametrize("name", ["mpc", "mpc-greedy", "ecofreq", "throttllem", "greenllm"])
def test_rivals_spend_less_where_less_is_computed(name):
    """They read the same projection, so they run and save with the cache on."""
    spent = {}
    for cache in ("off", "lru"):
        plant = plant_of("prefill", prefix_cache=cache, actuation_delay_s=0.05)
        policy = make_policy(name, context_of(plant))
        *_, (_, _, record) = decisions(policy, plant, chat())
        spent[cache] = float(record["energy_j"] - record["energy_idle_j"])
        assert int(record["finished"]) == 60
    assert spent["lru"] < 0.9 * spent["off"]
