"""The training environment: what its reward may and may not change, randomised plants, features."""

import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

from agents.policy.features import NAMES, FeatureMap, cheapest_mhz, plants_of
from agents.training.train_config import AgentConfig
from agents.training.worlds.duals import Tally
from agents.training.worlds.mixture import make_groups, targets
from agents.training.worlds.reward import Spread
from agents.training.worlds.training_env import AgentVecEnv
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.traces import Trace


def config_of(phase="prefill", **changes):
    part = {
        "profile": "azure-conv-like",
        "rates_rps": [2.0 if phase == "prefill" else 15.0],
        "workloads": 3,
        "episode_s": 40.0,
    }
    base = {
        "phase": phase,
        "n_envs": 8,
        "mixture": [part],
        "action": "clock",
        "hyper": {"gamma": 1.0},
    }
    return AgentConfig.model_validate(base | changes)


def make(phase="prefill", seed=0, **changes):
    config = config_of(phase, **changes)
    groups, counts = make_groups(config)
    return AgentVecEnv(config, groups, counts, seed)


def run_at(env, action, steps):
    env.reset()
    rewards = np.zeros(env.num_envs)
    for _ in range(steps):
        env.step_async(np.full((env.num_envs, 1), action, np.float32))
        _, r, done, infos = env.step_wait()
        rewards += r
        if done.any():
            assert infos[int(np.argmax(done))]["terminal_observation"].shape == (env.features.dim,)
    return rewards


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_reward_is_energy_and_violations_up_to_constants(phase):
    """With gamma 1 the shaped return differs from the plain one only by what no policy changes, and
    the potential at the end.
    """
    env = make(phase, randomise={"nominal_share": 1.0, "delay_s": [0.05, 0.05]})
    env.reset()
    env.shaper.spread = lambda cell, values: np.ones(
        len(values)
    )  # the division by the spread has its own test
    st, scale, ref = env.batch.states, env.config.reward_scale, env.plant.energy_ref_j
    first_lost, first_tail = env._late.copy(), st["tail"].copy()
    got, plain, tokens = np.zeros(8), np.zeros(8), np.zeros(8)
    for _ in range(30):
        env.step_async(np.zeros((8, 1), np.float32))
        _, r, done, _ = env.step_wait()
        assert not done.any()
        got += r
        plain -= st["step_energy_j"] / ref + env.duals.multipliers[0] * st["step_violations"]
        tokens += st["step_tokens"]
    joule_per_token, idle_w = env.shaper.baseline[0, 0]
    constants = (joule_per_token * tokens + idle_w * st["time_s"]) / ref
    begins = env.workloads.table.arrival_s[st["begin"]]
    constants -= idle_w * begins / ref  # the clock starts at the first arrival
    shaping = -env.duals.multipliers[0] * (
        env._late - first_lost - env.workloads.refund(first_tail, st["tail"])
    )
    assert np.allclose(got / scale, plain + constants + shaping, rtol=1e-4, atol=1e-3)


def test_spread_makes_quiet_and_loud_groups_alike():
    spread = Spread(2)
    rng = np.random.default_rng(0)
    cell = np.array([0, 1] * 50)
    for _ in range(400):
        values = rng.normal(0, 1, 100) * np.where(cell == 0, 0.1, 50.0)
        scaled = values / spread(cell, values)
    assert 0.5 < scaled[cell == 0].std() < 2.0
    assert 0.5 < scaled[cell == 1].std() < 2.0


def test_violations_cost_the_multiplier():
    extra = {}
    for clock in (-1.0, 1.0):
        cheap, dear = (make(seed=3, randomise={"nominal_share": 1.0}) for _ in range(2))
        cheap.duals.multipliers[:], dear.duals.multipliers[:] = 0.0, 100.0
        cheap.shaper.spread = dear.shaper.spread = lambda cell, values: np.ones(len(values))
        extra[clock] = run_at(cheap, clock, 60) - run_at(dear, clock, 60)
    assert (
        extra[-1.0] > 0
    ).all()  # at the lowest clock requests are lost, and only the multiplier tells
    assert extra[1.0] == pytest.approx(
        np.zeros(8), abs=1e-6
    )  # at the highest none is that could be kept


def test_violations_cost_the_price_that_the_network_is_told():
    """The price of each row's episode, in energies of a request at max clock, not one constant for
    all.
    """
    env = make(price=[1.0, 100.0], n_envs=32, randomise={"nominal_share": 1.0})
    observed = env.reset()
    assert env.violation_weight() == pytest.approx(env.price * env.workloads.request_cost[0])
    assert len(np.unique(env.price)) == 32
    told = 30.0 * np.exp(2.0 * observed[:, -1])
    assert told == pytest.approx(env.price, rel=1e-4)
    cheap, dear = (make(price=[p, p * 1.001], seed=3) for p in (1.0, 100.0))
    cheap.shaper.spread = dear.shaper.spread = lambda cell, values: np.ones(len(values))
    assert (run_at(cheap, -1.0, 60) - run_at(dear, -1.0, 60)).sum() > 0


def test_refunds_are_the_requests_that_max_clock_loses():
    env = make()
    lost = np.concatenate(env.workloads.late_at_max)
    assert env.workloads.refunds == lost.sum()
    assert make("decode").workloads.refunds == 0


def test_every_episode_has_its_own_plant():
    env = make(
        randomise={"delay_s": [0.0, 0.2], "slo_scale": [0.5, 2.0], "nominal_share": 0.5}, n_envs=32
    )
    env.reset()
    params = env.batch.params
    assert len(np.unique(params["delay_s"])) == 32
    assert params["delay_s"].min() >= 0.0
    assert params["delay_s"].max() <= 0.2
    assert 0.3 <= params["slo_s"].min() < params["slo_s"].max() <= 1.2
    assert (env.member == -1).any()
    assert (env.member >= 0).any()
    observed = env.plant.spec.value(env.batch.obs, "actuation_delay")
    assert np.allclose(observed, params["delay_s"], rtol=1e-5)


def test_groups_of_another_tp_run_on_their_own_model():
    parts = [
        {"rates_rps": [2.0], "workloads": 2, "episode_s": 30.0},
        {"rates_rps": [2.0], "workloads": 2, "episode_s": 30.0, "tp": 8},
    ]
    env = make(mixture=parts, n_envs=16, randomise={"nominal_share": 1.0})
    env.reset()
    assert set(env.batch.coefs["n_gpus"][env.group == 0]) == {4.0}
    assert set(env.batch.coefs["n_gpus"][env.group == 1]) == {8.0}


def test_same_seed_same_path_other_seed_other():
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert np.array_equal(run_at(first, 0.2, 40), run_at(again, 0.2, 40))
    assert not np.array_equal(run_at(make(seed=1), 0.2, 40), run_at(other, 0.2, 40))


def test_targets_never_ask_more_than_max_clock_gives():
    config = config_of()
    groups, _ = make_groups(config)
    lost = [np.array([True] * 5 + [False] * 95)]
    assert targets(config, groups, lost) == pytest.approx([0.95 - config.constraint.below_max])
    assert targets(config, groups, [np.zeros(100, bool)]) == pytest.approx(
        [0.99 + config.constraint.reserve]
    )


def test_tally_sums_per_group_and_per_cell():
    tally = Tally(2, 4)
    ones = np.ones(3)
    group, counted = np.array([0, 0, 1]), np.array([True, False, True])
    tally.count_requests(group[counted], ones[counted], ones[counted])
    tally.count_cost(np.array([0, 1, 3]), ones, 2 * ones)
    assert tally.finished.tolist() == [1.0, 1.0]
    assert tally.cost.tolist() == [1.0, 1.0, 0.0, 1.0]
    assert tally.time_s.tolist() == [2.0, 2.0, 0.0, 2.0]


def plant_with(phase, prompts, arrivals, delay_s=0.0):
    plant = Plant(PlantSettings.of(phase, actuation_delay_s=delay_s))
    n = len(prompts)
    trace = Trace(
        "t",
        np.array(arrivals, float),
        np.array(prompts, np.int32),
        np.full(n, 50, np.int32),
        "test",
    )
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]))
    batch.reset(np.zeros(1, int), np.zeros(1, int), np.full(1, -1))
    return plant, batch


def test_prefill_slack_feature_is_the_slack_that_then_happens():
    """One request, no delay: slack at a level = (SLO - duration at that level) / SLO, known in
    closed form.
    """
    plant, batch = plant_with("prefill", [1500], [0.5])
    features = FeatureMap("prefill", plant.spec)
    out, rule, lost = features(batch.obs, *plants_of(plant, "prefill", [-1]))
    levels = np.array(plant.clocks.levels_mhz)
    duration = plant.model.latency_s(1500, 1500**2 / 2, 0, 1, levels)
    assert np.allclose(out[0, :7], (0.6 - duration) / 0.6, atol=1e-4)
    assert plant.clocks.to_freq_mhz(rule)[0] == pytest.approx(
        cheapest_mhz(plant.model, "prefill", -1), abs=0.1
    )
    assert lost[0] == 0


def test_delay_costs_slack_and_a_hopeless_request_is_counted_lost():
    plant, batch = plant_with("prefill", [1500], [0.5])
    features = FeatureMap("prefill", plant.spec)
    batch.obs[0, plant.spec.index("freq_pending")] = 510 / 1980  # running at the lowest clock
    slacks = []
    for delay in (0.0, 0.05, 0.1):
        batch.obs[0, plant.spec.index("actuation_delay")] = delay / 0.1
        slacks.append(features(batch.obs, *plants_of(plant, plant.phase, [-1]))[0][0, 6])
    assert slacks[0] > slacks[1] > slacks[2]
    plant, batch = plant_with("prefill", [30000], [0.5])
    batch.obs[0, plant.spec.index("batch_completing_0")] = 1 / 32
    batch.obs[0, plant.spec.index("batch_slack_0")] = -0.1
    features = FeatureMap("prefill", plant.spec)
    assert features(batch.obs, *plants_of(plant, plant.phase, [-1]))[2][0] >= 1.0


def test_decode_time_features_are_the_models_latencies():
    plant, batch = plant_with("decode", [800] * 4, [0.1, 0.1, 0.1, 0.1])
    features = FeatureMap("decode", plant.spec)
    out, rule, _ = features(batch.obs, *plants_of(plant, plant.phase, [-1]))
    st = batch.states[0]
    expected = plant.model.latency_s(
        st["batch"], 0, st["cached"], st["batch"], np.array(plant.clocks.levels_mhz)
    )
    assert np.allclose(out[0, :7], expected / 0.1, rtol=1e-4)
    assert -1.0 <= rule[0] <= 1.0


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_features_are_finite_on_any_observation(phase):
    plant = Plant(PlantSettings.of(phase))
    rng = np.random.default_rng(0)
    spec = plant.spec
    obs = rng.uniform(np.maximum(spec.low, -20), np.minimum(spec.high, 50), (500, spec.dim)).astype(
        np.float32
    )
    obs[:, spec.index("slo")] = rng.uniform(0.1, 5, 500)
    obs[:, spec.index("freq_current")], obs[:, spec.index("freq_pending")] = rng.uniform(
        0.3, 1, (2, 500)
    )
    features = FeatureMap(phase, spec)
    out, rule, lost = features(obs, *plants_of(plant, plant.phase, [-1]))
    assert np.isfinite(out).all()
    assert np.isfinite(rule).all()
    assert (lost >= 0).all()
    assert (np.abs(rule) <= 1.0 + 1e-6).all()
    assert out.shape[1] == len(NAMES[phase])


def test_mistakes_are_one_sentence():
    with pytest.raises(BiscaleError, match="choose prefill or decode"):
        FeatureMap("cluster", None)
    with pytest.raises(BiscaleError, match="optional traces"):
        make(mixture=[{"trace": "/nowhere/at-all.csv", "optional": True, "loads": [0.5]}])
    with pytest.raises(BiscaleError):
        make(mixture=[{"trace": "/nowhere/at-all.csv", "loads": [0.5]}])
