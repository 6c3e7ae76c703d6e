"""Policy iteration: what clocks cost, against the models; what the actor learns of it."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("stable_baselines3")

from stable_baselines3.common.logger import configure  # noqa: E402

from agents.policy.features import cheapest_mhz, with_price  # noqa: E402
from agents.policy.numpy_policy import load_network  # noqa: E402
from agents.training.algorithms import algorithm  # noqa: E402
from agents.training.policy_iteration import (  # noqa: E402
    CostSamples,
    expected_cost,
    scaled_costs,
)
from agents.training.run import make_model, set_up, train  # noqa: E402
from agents.training.train_config import AgentConfig, load_config  # noqa: E402
from agents.training.worlds.clock_costs import ClockCosts  # noqa: E402
from agents.training.worlds.mixture import make_groups  # noqa: E402
from agents.training.worlds.training_env import AgentVecEnv  # noqa: E402
from biscale_env.core.errors import BiscaleError  # noqa: E402
from biscale_env.envs.batch import Batch  # noqa: E402
from biscale_env.models.physics import idle_power_w  # noqa: E402

AT_ONCE = {"delay_s": (0.0, 0.0), "nominal_share": 1.0}
HYPER = {"n_steps": 40, "sample_every": 2, "clocks": 9, "sigma": [0.4, 0.15], "rounds_kept": 3}


def small(**changes):
    base = {
        "phase": "prefill", "algo": "policy_iteration", "n_envs": 16, "total_timesteps": 1920,
        "net_arch": [16], "hyper": HYPER, "price": [1.0, 100.0], "log_std_init": -1.5,
        "mixture": [{"rates_rps": [2.0], "workloads": 2, "episode_s": 60.0}],
        "evaluation": {"every_steps": 640, "workloads": 1},
    }  # fmt: skip
    return AgentConfig.model_validate(base | changes)


def env_of(config):
    env = AgentVecEnv(config, *make_groups(config), seed=0)
    env.reset()
    return env


def stay(action):
    """A network (action kind ``clock``) that always asks for one action."""
    return lambda features: np.full(len(features), action, dtype=np.float32)


def test_a_lone_request_costs_what_the_models_say():
    """Energy of its batch at each clock, then idle power at that clock to the horizon."""
    quiet = [{"rates_rps": [0.02], "workloads": 16, "episode_s": 600.0}]
    env = env_of(small(action="clock", mixture=quiet, randomise=AT_ONCE))
    costs = ClockCosts(env, 7, (3.0, 3.0))
    found, whole = costs(stay(0.0))
    plant, table, st = env.groups[0].plant, env.workloads.table, env.batch.states
    checked = 0
    for row in np.flatnonzero(whole):
        head, tail, end = int(st["head"][row]), int(st["tail"][row]), int(st["end"][row])
        prompt = int(table.prompt[head])
        soon = tail < end and table.arrival_s[tail] <= st["time_s"][row] + 3.0
        if tail - head != 1 or soon or prompt > plant.settings.token_budget:
            continue
        work = (prompt, 0.5 * prompt**2, 0.0, 1.0)
        mhz = plant.clocks.snap_mhz(plant.clocks.to_freq_mhz(costs.actions))
        busy_s = np.array([plant.model.latency_s(*work, f) for f in mhz])
        busy_j = np.array([plant.model.energy_j(*work, f) for f in mhz])
        c = plant.model.member(-1)
        idle_j = np.array([c.n_gpus * idle_power_w(c, f / 1e3) for f in mhz]) * (3.0 - busy_s)
        late = busy_s > env.groups[0].slo_s
        expected = (busy_j + idle_j) / plant.energy_ref_j + env.violation_weight()[row] * late
        np.testing.assert_allclose(found[row], expected, rtol=1e-9)
        checked += 1
    assert checked >= 5
    assert np.ptp(found[whole], axis=1).min() > 0.0


def mixed():
    """Groups of several kinds, random members and delays, a network that reads its features."""
    parts = [
        {"rates_rps": [2.0, 5.0], "workloads": 2, "episode_s": 60.0},
        {"idle": "parked", "rates_rps": [3.0], "workloads": 2, "episode_s": 60.0},
        {"llm": "llama-3.1-8b", "tp": 1, "rates_rps": [6.0], "workloads": 2, "episode_s": 60.0},
    ]
    config = small(n_envs=24, mixture=parts)
    env = env_of(config)
    return env, make_model(config, env, None)


def by_hand(env, act, row, action, end_s):
    """One copy of a row, stepped alone: energy, J, end, s, and late requests."""
    group, arrivals = env.groups[int(env.group[row])], env.workloads.table.arrival_s
    one = Batch(group.plant, 1, env.workloads.table)
    one.states[0], one.coefs[0] = env.batch.states[row], env.batch.coefs[row]
    one.params[0] = env.batch.params[row]
    one.params["end_s"], one.params["drain"] = end_s, 1
    begin, last = int(one.states["tail"][0]), int(one.states["end"][0])
    one.states["end"] = begin + (arrivals[begin:last] <= end_s).sum()
    before = one.states[0].copy()
    while not one.done[0]:
        one.step(np.array([action], np.float32))
        features, rule, _ = env.features(one.obs, one.coefs, env._known[row : row + 1])
        action = env.actions(act(with_price(features, env.price[row : row + 1])), rule)[0]
    after = one.states[0]
    late = after["violations"] - before["violations"]
    return after["energy_j"] - before["energy_j"], after["time_s"], late


@pytest.mark.slow
def test_costs_are_those_of_copies_that_are_run_one_by_one():
    env, model = mixed()
    costs, compared = ClockCosts(env, 5, (2.0, 10.0)), 0
    for step in range(24):
        if step % 12 == 7:
            found, whole = costs(model.act)
            ends = env.batch.states["time_s"] + costs.horizon_s[env.group]
            assert np.array_equal(whole, ends < env.batch.params["end_s"])
            for row in range(24):
                runs = [by_hand(env, model.act, row, a, ends[row]) for a in costs.actions]
                energy_j, end_s, late = np.array(runs).T
                plant, member = env.groups[int(env.group[row])].plant, int(env.member[row])
                cheapest = cheapest_mhz(plant.model, "prefill", member)
                idle_w = plant.waiting_power_w(member, cheapest)
                joules = energy_j + idle_w * (end_s.max() - end_s)
                price = env.price[row] * env.workloads.request_cost[env.group[row]]
                expected = joules / plant.energy_ref_j + price * late
                np.testing.assert_allclose(found[row], expected, rtol=1e-9)
                compared += 1
        env.step(model._exploring(env._observe()))
    assert compared == 48
    assert len(set(env.member.tolist())) > 2
    assert len(set(env.group.tolist())) == 4


def test_rows_whose_episode_ends_within_the_horizon_do_not_count():
    """Nothing arrives after the end of an episode: low clocks would look cheap there."""
    env = env_of(small(mixture=[{"rates_rps": [2.0], "workloads": 2, "episode_s": 12.0}]))
    costs, counted = ClockCosts(env, 3, (4.0, 4.0)), []
    for _ in range(30):
        _, whole = costs(stay(0.0))
        assert np.array_equal(whole, env.batch.states["time_s"] + 4.0 < 12.0)
        counted.append(whole.mean())
        env.step(np.zeros(16, np.float32))
    assert 0.3 < np.mean(counted) < 0.9


def test_asking_for_costs_changes_nothing():
    """States, observations and what comes next are those of an environment that is not asked."""
    config = small(mixture=[{"rates_rps": [4.0], "workloads": 2, "episode_s": 60.0}])
    asked, plain = env_of(config), env_of(config)
    costs = ClockCosts(asked, 5, (2.0, 4.0))
    for k in range(12):
        costs(stay(0.1 * k - 0.5))
        steps = [env.step(np.full(16, 0.2, np.float32)) for env in (asked, plain)]
        for a, b in zip(*(step[:3] for step in steps), strict=True):
            assert np.array_equal(a, b)
    assert np.array_equal(asked.batch.states, plain.batch.states)


def test_a_price_is_paid_per_late_request():
    env = env_of(small(mixture=[{"rates_rps": [6.0], "workloads": 2, "episode_s": 60.0}]))
    for _ in range(30):
        env.step(np.full(16, -1.0, np.float32))
    costs, found = ClockCosts(env, 5, (2.0, 2.0)), []
    for price in (10.0, 13.0):
        env.price[:] = price
        found.append(costs(stay(-1.0))[0])
    paid = (found[1] - found[0]) / (3.0 * env.workloads.request_cost[0])
    late = np.round(paid)
    np.testing.assert_allclose(paid, late, atol=1e-9)
    assert late.max() >= 1
    assert (late[:, 0] >= late[:, -1]).all(), "the lowest clock first is never better for the SLO"


def test_nothing_is_met_that_arrives_after_the_horizon():
    env = env_of(small(mixture=[{"rates_rps": [3.0], "workloads": 2, "episode_s": 60.0}]))
    costs = ClockCosts(env, 3, (1.5, 1.5))
    end_s = env.batch.states["time_s"] + 1.5
    costs(stay(1.0))
    copies, arrivals = costs._batch.states, env.workloads.table.arrival_s
    last = copies["head"].reshape(16, 3)
    for row in range(16):
        begin, end = int(env.batch.states["begin"][row]), int(env.batch.states["end"][row])
        due = begin + np.searchsorted(arrivals[begin:end], end_s[row], side="right")
        assert (last[row] == due).all(), "all that arrived by then is served, and no more"


def test_horizons_follow_the_rate_within_their_bounds():
    rates = [0.05, 0.5, 20.0]
    env = env_of(small(mixture=[{"rates_rps": rates, "workloads": 1, "episode_s": 60.0}]))
    assert ClockCosts(env, 3, (2.0, 10.0)).horizon_s.tolist() == [10.0, 4.0, 2.0]


def learned(cost, sigmas):
    """Where gradient descent on the mean of ``cost`` ends, over falling widths."""
    clocks, action = torch.linspace(-1, 1, cost.shape[1]), torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.Adam([action], lr=0.05)
    for sigma in sigmas:
        loss = expected_cost(action.expand(len(cost)), clocks, cost, sigma).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return action.item()


def test_the_action_of_least_mean_cost_is_learned_not_the_usual_best():
    """Nine futures of ten want the lowest clock; the tenth makes all low ones dear."""
    clocks = torch.linspace(-1, 1, 9)
    usual, rare = (clocks + 1) * 0.1, torch.where(clocks < 0.3, 4.0, (clocks + 1) * 0.1)
    cost = torch.stack([usual] * 9 + [rare])
    assert int(usual.argmin()) == 0
    assert float(clocks[cost.mean(dim=0).argmin()]) == 0.5
    assert learned(cost, np.linspace(0.4, 0.08, 200)) == pytest.approx(0.5, abs=0.2)


def test_a_wide_start_finds_the_deeper_of_two_minima():
    cost = torch.tensor([[2.0, 1.0, 0.5, 0.3, 0.4, 0.8, 0.5, 0.0, 0.3]])
    assert learned(cost, np.full(200, 0.08)) == pytest.approx(-0.25, abs=0.15)
    assert learned(cost, np.linspace(0.4, 0.08, 200)) == pytest.approx(0.75, abs=0.15)


def samples_of(env, cost, n=256):
    """Samples with the same costs everywhere, and rules all over the range."""
    rng = np.random.default_rng(0)
    rule = rng.uniform(-0.8, 0.8, n).astype(np.float32)
    features = np.zeros((n, env.dim), np.float32)
    features[:, 0] = rule
    rows = np.tile(np.asarray(cost, np.float32), (n, 1))
    return CostSamples(features, rule, rows, np.zeros(n, np.int64))


def test_the_actor_asks_for_the_cheapest_clock_whatever_the_rule_says():
    """The costs are of clocks: what the network adds to the rule has to undo it."""
    config = small(hyper=HYPER | {"n_epochs": 200, "batch_size": 64, "learning_rate": 0.01})
    env = env_of(config)
    model = make_model(config, env, None)
    model._logger = configure(format_strings=[])
    model._costs = ClockCosts(env, 9, (2.0, 4.0))
    model._left = 0.0  # the narrow width; the rate of a constant schedule
    cost = (np.linspace(-1.0, 1.0, 9) - 0.25) ** 2
    model.rounds = (samples_of(env, cost - cost.mean()),)
    model.train()
    sample = model.rounds[0]
    asked = env.actions(model.act(sample.features), sample.rule)
    np.testing.assert_allclose(asked, 0.25, atol=0.12)


def test_width_and_rate_are_those_of_the_begin_of_a_round():
    """Three rounds: the last one learns, too, and more steps than asked for change no sign."""
    config = small(anneal=True, total_timesteps=16 * 40 * 3 - 100)
    env = env_of(config)
    model = make_model(config, env, None)
    seen, train_round = [], model.train

    def watched():
        before = model.policy.action_net.weight.detach().clone()
        train_round()
        rate = model.policy.optimizer.param_groups[0]["lr"]
        moved = (model.policy.action_net.weight.detach() - before).abs().max().item()
        seen.append((model.sigma, rate, moved))

    model.train = watched
    model.learn(config.total_timesteps)
    sigma, rate, moved = (np.array(column) for column in zip(*seen, strict=True))
    left = 1.0 - np.array([0, 640, 1280]) / config.total_timesteps
    np.testing.assert_allclose(sigma, 0.15 + 0.25 * left)
    np.testing.assert_allclose(rate, 1e-3 * left)
    assert (moved > 0.0).all()


def test_some_decisions_explore():
    env, model = mixed()
    features = env.reset()
    differ = [model._exploring(features) != model.act(features) for _ in range(50)]
    assert np.mean(differ) == pytest.approx(0.5, abs=0.1)


def test_actions_outside_the_range_are_pulled_back():
    clocks, cost = torch.linspace(-1, 1, 5), torch.zeros(1, 5)
    action = torch.tensor([1.7], requires_grad=True)
    value = expected_cost(action, clocks, cost, 0.1)
    value.sum().backward()
    assert value.item() > 0.0
    assert action.grad.item() > 0.0


def test_cells_count_alike_whatever_their_prices():
    rng = np.random.default_rng(0)
    cell = np.repeat([0, 3], 500)
    cost = rng.normal(size=(1000, 4)) * np.where(cell == 0, 1.0, 700.0)[:, None]
    scaled = scaled_costs(cost.astype(np.float32), cell)
    for k in (0, 3):
        assert np.sqrt((scaled[cell == k] ** 2).mean()) == pytest.approx(1.0, abs=0.01)
    rare = np.zeros((1000, 2), np.float32)
    rare[0] = -1e6, 1e6
    assert np.abs(scaled_costs(rare, np.zeros(1000, np.int64))).max() == 20.0


@pytest.mark.slow
def test_training_saves_energy_at_the_same_attainment(tmp_path):
    """From a network that knows no rule; max clock is 1, and every request is met throughout."""
    run = set_up(small(action="clock", total_timesteps=16 * 40 * 6), tmp_path / "run")
    metrics = train(run, print)
    scores = [score for _, _, score in run.evaluate.history]
    assert scores[0] - scores[-1] > 0.02, scores
    assert (metrics.attainment >= run.evaluate.targets).all()
    network = load_network(tmp_path / "run" / "best.npz")
    assert network.card["algo"] == "policy_iteration"
    assert len(run.model.rounds) == 3


@pytest.mark.slow
def test_a_stored_model_decides_as_before_without_an_environment(tmp_path):
    run = set_up(small(), tmp_path / "run")
    train(run, print)
    run.model.save(tmp_path / "x.zip")
    assert (tmp_path / "x.zip").stat().st_size < 300_000, "samples are not part of a model"
    again = algorithm("policy_iteration").load(tmp_path / "x.zip", device="cpu")
    features = np.random.default_rng(0).normal(size=(50, run.env.dim)).astype(np.float32)
    assert np.array_equal(again.act(features), run.model.act(features))
    said = run.model.predict(features, deterministic=True)[0][:, 0]
    np.testing.assert_allclose(said, run.model.act(features), atol=1e-6)


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({"sample_every": 0}, "sample_every must be a whole number above 0, got 0"),
        ({"n_steps": 0}, "n_steps must be a whole number above 0, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number above 0, got 0"),
        ({"rounds_kept": 0}, "rounds_kept must be a whole number above 0, got 0"),
        ({"n_epochs": 1.5}, "n_epochs must be a whole number above 0, got 1.5"),
        ({"clocks": 1}, "clocks must be a whole number from 2 on, got 1"),
        ({"clocks": 2.5}, "clocks must be a whole number from 2 on, got 2.5"),
        ({"horizon_s": 3}, "horizon_s must be two numbers above 0, got 3"),
        ({"horizon_s": [2]}, r"horizon_s must be two numbers above 0, got \[2\]"),
        ({"horizon_s": [3, 2]}, r"horizon_s must be \[shortest, longest\], got \[3, 2\]"),
        ({"sigma": [0.4, 0.0]}, r"sigma must be two numbers above 0, got \[0.4, 0.0\]"),
        ({"sigma": 0.1}, "sigma must be two numbers above 0, got 0.1"),
        ({"explore_share": 2}, "explore_share must be from 0 to 1, got 2"),
    ],
)
def test_impossible_settings_are_one_sentence_before_anything_is_run(hyper, words):
    config = small(hyper=HYPER | hyper)
    with pytest.raises(BiscaleError, match=f"policy_iteration: {words}"):
        make_model(config, env_of(config), None)


def test_the_simulators_device_is_the_only_one():
    config = small(device="cuda")
    with pytest.raises(BiscaleError, match="device must be cpu, got cuda"):
        make_model(config, env_of(config), None)


def test_mistakes_are_one_sentence(tmp_path):
    for changes, words in (
        ({"price": None}, "needs a range of penalties: give price"),
        ({"mixture": [{"rates_rps": [0.5], "workloads": 1, "episode_s": 3.0}]}, "no longer than"),
    ):
        with pytest.raises(BiscaleError, match=words):
            ClockCosts(env_of(small(**changes)), 5, (4.0, 4.0))
    decode = AgentConfig.model_validate(
        {"phase": "decode", "n_envs": 2, "mixture": [{"rates_rps": [5.0], "episode_s": 10.0}]}
    )
    with pytest.raises(BiscaleError, match="policy_iteration is for prefill"):
        ClockCosts(env_of(decode), 5, (1.0, 2.0))
    with pytest.raises(BiscaleError, match="for prefill, but decode"):
        load_config("prefill-policy-iteration", "decode")
    with pytest.raises(BiscaleError, match="is for prefill, not for decode: use ppo there"):
        load_config(None, "decode", "policy_iteration")
    path, head = tmp_path / "c.yaml", "algo: policy_iteration\nmixture: [{rates_rps: [5.0]}]\n"
    path.write_text(f"phase: decode\n{head}")
    with pytest.raises(BiscaleError, match="is for prefill, not for decode"):
        load_config(path, "decode")
    path.write_text(f"phase: prefill\n{head}")
    with pytest.raises(BiscaleError, match=r"give price: \[low, high\]"):
        load_config(path, "prefill")


def test_only_the_training_environment_can_be_copied():
    gym = pytest.importorskip("gymnasium")
    from stable_baselines3.common.vec_env import DummyVecEnv

    model = make_model(small(), DummyVecEnv([lambda: gym.make("Pendulum-v1")]), None)
    with pytest.raises(BiscaleError, match="start it with biscale train"):
        model.learn(10)
