"""The learned coarse policy at work: choices, masks, checkpoint, names, mistakes."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coarse_parts import forecast

from agents.coarse.coarse_agent import CoarseAgent
from agents.coarse.coarse_checkpoint import CoarseCheckpoint, load_coarse
from agents.coarse.coarse_config import load_coarse_config
from agents.coarse.window_costs import SHARES, WindowCosts, measured_on
from agents.policy.numpy_policy import load_network
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_env import ClusterEnv
from biscale_env.policies.checkpoint_source import SHIPPED
from biscale_env.policies.coarse_resolver import resolve_coarse

PER_GPU_RPS = {"prefill": 20.0, "decode": 5.0}
OPTIONS = {
    "windows": 3,
    "window_s": 20.0,
    "rate_rps": 8.0,
    "freqs_mhz": (1980.0,),
    "dtype": "fp8",
    "transitions": {"cold_start_s": 5.0, "reshard_s": 1.0},
}


@pytest.fixture(scope="module")
def env():
    return ClusterEnv(**OPTIONS)


def costs(env, left_out=()):
    """Made-up costs of all instances: what they serve and draw is in proportion to their GPUs."""
    kinds = sorted({(g.phase, g.tp, g.count) for p in env.placements for g in p.groups})
    kinds = [kind for kind in kinds if kind not in left_out]
    gpus = np.array([tp * n for _, tp, n in kinds], dtype=float)
    per_gpu = np.array([PER_GPU_RPS[phase] for phase, _, _ in kinds])
    power_w = gpus[:, None] * (120.0 + 300.0 * np.minimum(SHARES, 1.0))
    missed = np.tile(np.clip(2 * (SHARES - 0.9), 0.0, 1.0), (len(kinds), 1))
    return WindowCosts(tuple(kinds), gpus * per_gpu, power_w, missed, measured_on(env))


def checkpoint(env, price=3.0, told=None, **changes):
    made = costs(env, **changes)
    return CoarseCheckpoint(told or forecast(), made, 20.0, (0.1, 1000.0), price, {"who": "test"})


def gpus_of(agent, chosen):
    return {g.phase: g.tp * g.count for g in agent.placements[chosen].groups}


# --- choices


def test_a_known_load_gets_the_fewest_gpus_that_serve_it(env):
    """No spread, no misses up to 0.9 of the capacity, a high price: the optimum is known."""
    agent = CoarseAgent(checkpoint(env, 1000.0, forecast(spread=1e-9)), env)
    largest = agent.placements[agent._largest()]
    for load_rps, want in ((8.0, 2), (17.0, 4), (30.0, 8)):
        assert gpus_of(agent, agent.choose([load_rps], largest))["decode"] == want


def test_misses_are_bought_when_they_are_cheap(env):
    """At a price of nearly nothing the smallest placement is best, at a high one it never is."""
    free = CoarseAgent(checkpoint(env, 0.1), env)
    dear = CoarseAgent(checkpoint(env, 1000.0), env)
    before = free.placements[-1]
    assert sum(gpus_of(free, free.choose([30.0], before)).values()) == 4
    assert sum(gpus_of(dear, dear.choose([30.0], before)).values()) > 8


def lost_by(c, k, load):
    """The made-up misses never fall; beyond the capacity the rest of the load is added."""
    return np.interp(load / c.capacity_rps[k], SHARES, c.missed[k]) + max(
        1 - c.capacity_rps[k] / load, 0
    )


def by_hand(agent, rates, before):
    """The expected cost of every placement, load by load in plain Python."""
    c, found = agent.checkpoint.costs, []
    loads = agent.checkpoint.forecast.loads_rps(rates)
    for placement in agent.placements:
        total = 0.0
        for g in placement.groups:
            old = next(b for b in before.groups if b.phase == g.phase)
            k, was = (c.kinds.index((x.phase, x.tp, x.count)) for x in (g, old))
            for load in loads:
                watts = np.interp(load / c.capacity_rps[k], SHARES, c.power_w[k])
                lost = lost_by(c, k, load)
                if old.tp != g.tp:
                    lost += 1.0 / 20.0 * (1.0 - lost)
                elif old.count < g.count:
                    lost += 5.0 / 20.0 * (lost_by(c, was, load) - lost)
                watts -= agent._spare_w * g.tp * g.count
                total += 20.0 * (watts + agent.price * c.request_j * lost * load) / len(loads)
        found.append(total)
    return np.array(found)


@settings(max_examples=15, deadline=None)
@given(st.floats(1.0, 90.0), st.integers(0, 1000), st.floats(0.05, 0.6))
def test_costs_are_those_of_plain_arithmetic(env, load_rps, number, spread):
    agent = CoarseAgent(checkpoint(env, told=forecast(0.1, spread, (-2.0, 0.0, 3.0), (1.0,))), env)
    before = agent.placements[number % len(agent.placements)]
    want = by_hand(agent, [load_rps], before)
    np.testing.assert_allclose(agent.costs_j([load_rps], before), want, rtol=1e-9)
    assert agent.choose([load_rps], before) == want.argmin()


@settings(max_examples=25, deadline=None)
@given(st.floats(0.5, 120.0), st.integers(0, 1000), st.floats(0.2, 900.0))
def test_what_was_not_measured_is_never_taken(env, load_rps, number, price):
    masked = {("decode", 2, 1), ("decode", 2, 3), ("prefill", 2, 1)}
    agent = CoarseAgent(checkpoint(env, price, left_out=masked), env)
    before = agent.placements[number % len(agent.placements)]  # may itself be one of these
    chosen = agent.placements[agent.choose([load_rps], before)]
    assert not masked & {(g.phase, g.tp, g.count) for g in chosen.groups}
    assert chosen.gpus <= 16


@pytest.mark.parametrize("load_rps", [60.0, 150.0, 1000.0])
def test_it_does_not_give_up_where_nothing_serves_the_load(env, load_rps):
    """It misses as little as any placement, though every one misses much."""
    agent = CoarseAgent(checkpoint(env, 1000.0, forecast(spread=1e-9)), env)
    chosen = agent.choose([load_rps], agent.placements[agent._largest()])
    assert agent.placements[chosen].gpus >= 14
    c = agent.checkpoint.costs
    lost = [sum(lost_by(c, k, load_rps) for k in kinds) for kinds in agent.kinds]
    assert lost[chosen] <= min(lost) + 0.05


def test_a_backlog_asks_for_more(env):
    agent = CoarseAgent(checkpoint(env, 100.0), env)
    before = agent.placements[agent._largest()]
    calm, late = (gpus_of(agent, agent.choose([8.0], before, b)) for b in (0.0, 200.0))
    assert late["decode"] > calm["decode"]


def test_an_episode_from_what_the_environment_shows(env):
    mine = copy.deepcopy(env)
    agent, memory = CoarseAgent(checkpoint(mine), mine), None
    seen, _ = mine.reset(seed=0)
    chosen = []
    for _ in range(3):
        placement, memory = agent.place(seen, memory)
        seen, *_, over, info = mine.step_placement(placement)
        chosen.append(placement)
    assert over
    assert chosen[0] == mine.placements[agent._largest()]
    assert chosen[1].gpus < chosen[0].gpus
    assert info["kpis"]["requests_finished"] > 0
    assert len(memory.rates_rps) == 2


# --- checkpoint


def test_a_checkpoint_comes_back_bit_for_bit(env, tmp_path):
    made = checkpoint(env, told=forecast(0.1, 0.3, (-1.0, 1.0), (0.5,)))
    made.save(tmp_path / "a.npz")
    read = load_coarse(tmp_path / "a.npz")
    for part in ("forecast", "costs"):
        for name, value in vars(getattr(made, part)).items():
            again = getattr(getattr(read, part), name)
            assert np.array_equal(value, again) if isinstance(value, np.ndarray) else value == again
    assert (read.price, read.prices, read.window_s, read.card) == (
        3.0,
        (0.1, 1000.0),
        20.0,
        made.card,
    )
    one, two = (CoarseAgent(c, env) for c in (made, read))
    np.testing.assert_array_equal(
        one.costs_j([9.0, 11.0], env.placements[5]), two.costs_j([9.0, 11.0], env.placements[5])
    )


def test_a_cut_off_or_unfinished_checkpoint_is_refused(env, tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(BiscaleError, match="does not exist"):
        load_coarse(path)
    checkpoint(env).save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BiscaleError, match="cannot be read"):
        load_coarse(path)
    bad = checkpoint(env, told=forecast(np.nan))
    bad.save(path)
    with pytest.raises(BiscaleError, match="not finite"):
        load_coarse(path)


def test_checkpoints_of_another_kind_are_refused_both_ways(env, tmp_path):
    with pytest.raises(BiscaleError, match="is for prefill, not for the cluster"):
        load_coarse(SHIPPED / "prefill.npz")
    checkpoint(env).save(tmp_path / "c.npz")
    with pytest.raises(BiscaleError, match="is for the coarse loop"):
        load_network(tmp_path / "c.npz")


# --- names and mistakes


def test_policies_by_name(env, tmp_path):
    path = tmp_path / "best.npz"
    checkpoint(env).save(path)
    assert resolve_coarse(str(path), env).price == 3.0
    assert resolve_coarse(f"{tmp_path}:price=7", env).price == 7.0
    with pytest.raises(BiscaleError, match="did you mean 'ilp'"):
        resolve_coarse("ipl", env)
    with pytest.raises(BiscaleError, match="has no parameter 'margin'"):
        resolve_coarse(f"{path}:margin=0.2", env)
    with pytest.raises(BiscaleError, match=r"from 0\.1 to 1000, got 0\.01"):
        resolve_coarse(f"{path}:price=0.01", env)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"gpu": "b200-sxm"}, "measured with gpu=None, not 'b200-sxm'"),
        ({"decode_policy": "static"}, "decode_policy='slack', not 'static'"),
        ({"profile": "azure-conv-like"}, "profile='gamma-sharegpt-like'"),
        ({"window_s": 30.0}, "windows of 20 s, but the environment has 30 s"),
    ],
)
def test_another_cluster_is_named(env, changes, match):
    with pytest.raises(BiscaleError, match=match):
        CoarseAgent(checkpoint(env), ClusterEnv(**{**OPTIONS, **changes}))


def test_transitions_and_spare_gpus_may_differ(env):
    other = ClusterEnv(**{**OPTIONS, "transitions": {}, "spare": "off"})
    agent = CoarseAgent(checkpoint(env), other)
    assert agent.transitions.cold_start_s == 0


def test_the_price_of_the_checkpoint_is_its_default(env):
    made = checkpoint(env)
    assert CoarseAgent(replace(made, price=8.0), env).price == 8.0
    assert CoarseAgent(made, env, 9.0).price == 9.0


def test_the_shipped_agent_is_that_of_the_shipped_config():
    config = load_coarse_config(None)
    agent = resolve_coarse("agent", config.make_env())
    assert isinstance(agent, CoarseAgent)
    assert agent.known.sum() == 60
    assert agent.checkpoint.card["config"] == config.model_dump(mode="json")
    assert agent.checkpoint.card["tuned_met"]
    # never fewer GPUs for more of a load that has been constant
    loads = np.geomspace(3.0, 60.0, 12)
    before = agent.placements[agent._largest()]
    chosen = [agent.placements[agent.choose([load] * 13, before)].gpus for load in loads]
    assert chosen == sorted(chosen)
    assert chosen[0] == 4
