"""Training end to end on tiny runs.

Equal export, resume, refusals, the Lagrangian, cloning, tuning.
"""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

torch = pytest.importorskip("torch")
pytest.importorskip("stable_baselines3")

from agents.policy.features_prefill import PREFILL_NAMES  # noqa: E402
from agents.policy.numpy_policy import NumpyPolicy, load_network  # noqa: E402
from agents.policy.sb3_policy import Sb3Policy  # noqa: E402
from agents.training.algorithms import ALGORITHMS, check_hyper  # noqa: E402
from agents.training.clone import collect, oracle_data, output_for, warm_start  # noqa: E402
from agents.training.export import to_network  # noqa: E402
from agents.training.lookahead_teacher import LookaheadTeacher  # noqa: E402
from agents.training.progress import live_line  # noqa: E402
from agents.training.progress.callbacks import Lagrangian  # noqa: E402
from agents.training.run import make_model, set_up, train  # noqa: E402
from agents.training.study import SPACES, run_study, starting_point, suggest  # noqa: E402
from agents.training.train_config import AgentConfig, WarmStart, load_config  # noqa: E402
from agents.training.worlds.mixture import make_groups  # noqa: E402
from agents.training.worlds.training_env import AgentVecEnv  # noqa: E402
from biscale_env.config.loader import list_names  # noqa: E402
from biscale_env.core.errors import BiscaleError  # noqa: E402
from controllers.oracle.lookahead import (  # noqa: E402
    LookaheadPlanner,
    PlanWeights,
    run_lookahead,
)
from controllers.oracle.make import make_oracle  # noqa: E402

HYPER = {
    "ppo": {"n_steps": 16, "batch_size": 64, "n_epochs": 1},
    "recurrent_ppo": {"n_steps": 16, "batch_size": 64, "n_epochs": 1},
    "sac": {"buffer_size": 1000, "learning_starts": 50, "batch_size": 32, "gradient_steps": 1},
    "tqc": {"buffer_size": 1000, "learning_starts": 50, "batch_size": 32, "gradient_steps": 1},
    "dqn": {"buffer_size": 1000, "learning_starts": 50, "batch_size": 32},
    "policy_iteration": {"n_steps": 8, "sample_every": 4, "clocks": 3, "batch_size": 16},
}


def tiny(algo="ppo", **changes):
    base = {
        "phase": "prefill", "algo": algo, "n_envs": 8, "total_timesteps": 256,
        "net_arch": [16], "hyper": HYPER[algo],
        "action": "levels" if algo == "dqn" else "rule",
        "mixture": [{"rates_rps": [2.0], "workloads": 2, "episode_s": 30.0}],
        "evaluation": {"every_steps": 128, "workloads": 1},
    }  # fmt: skip
    return AgentConfig.model_validate(base | changes)


def env_of(config, seed=0):
    return AgentVecEnv(config, *make_groups(config), seed)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ppo", "sac", "dqn", "policy_iteration"])
def test_exported_network_equals_the_torch_policy(algo, tmp_path):
    config = tiny(algo, price=None if algo == "sac" else [3.0, 300.0])
    run = set_up(config, tmp_path / "run")
    train(run, print)
    (tmp_path / "run" / "best.zip").replace(tmp_path / "run" / "x.zip")
    run.model.save(tmp_path / "run" / "x.zip")
    to_network(run.model, config, price=config.price and 30.0).save(tmp_path / "x.npz")
    plant, obs = run.env.plant, run.env.batch.obs.copy()
    plain = NumpyPolicy.load(tmp_path / "x.npz", plant).predict(obs)[0]
    torch_says = Sb3Policy.load(tmp_path / "run" / "x.zip", plant).predict(obs)[0]
    assert np.allclose(plain, torch_says, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["tqc", "recurrent_ppo"])
def test_other_algorithms_train_and_their_zip_decides(algo, tmp_path):
    run = set_up(tiny(algo), tmp_path / "run")
    figures = train(run, print)
    assert np.isfinite(figures.energy_ratio).all()
    assert 0 < figures.energy_ratio[0] < 1.2
    policy = Sb3Policy.load(tmp_path / "run" / "best.zip", run.env.plant)
    obs = run.env.batch.obs.copy()
    action, state = policy.predict(obs, episode_start=np.ones(8, bool))
    again, _ = policy.predict(obs, state=state, episode_start=np.zeros(8, bool))
    assert action.shape == again.shape == (8, 1)
    assert (np.abs(action) <= 1).all()
    if algo == "recurrent_ppo":
        with pytest.raises(BiscaleError, match="recurrent"):
            to_network(run.model, run.config)


@pytest.mark.slow
def test_runs_resume_and_refuse_changes(tmp_path):
    folder = tmp_path / "run"
    first = set_up(tiny(), folder)
    train(first, print)
    names = {p.name for p in folder.iterdir()}
    assert {
        "config.yaml",
        "last.zip",
        "best.npz",
        "best.zip",
        "state.json",
        "evaluations.csv",
        "multipliers.csv",
        "tensorboard",
    } <= names
    spent = json.loads((folder / "state.json").read_text())["cpu_minutes"]
    assert (
        0.0
        < load_network(folder / "best.npz").card["cpu_minutes"]
        <= spent
        <= first.cpu_s / 60 + 1e-3
    )
    with pytest.raises(BiscaleError, match="--resume"):
        set_up(tiny(), folder)
    with pytest.raises(BiscaleError, match="'n_envs' was 8 and is now 4"):
        set_up(tiny(n_envs=4), folder, resume=True)
    with pytest.raises(BiscaleError, match="no training run"):
        set_up(tiny(), tmp_path / "other", resume=True)
    again = set_up(tiny(), folder, resume=True)
    assert again.model.num_timesteps == first.model.num_timesteps == 256
    assert np.array_equal(again.env.duals.multipliers, first.env.duals.multipliers)
    assert again.evaluate.history[0][0] == 0
    assert len(again.evaluate.history) == len(first.evaluate.history)
    assert len(again.lagrangian.path) == len(first.lagrangian.path)
    (folder / "last.zip").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(BiscaleError, match="cannot be loaded"):
        set_up(tiny(), folder, resume=True)


@pytest.mark.slow
def test_ctrl_c_leaves_the_last_good_state(tmp_path):
    run = set_up(tiny(total_timesteps=100_000), tmp_path / "run")
    steps = run.env.step_wait

    def interrupted():
        if run.model.num_timesteps > 300:
            raise KeyboardInterrupt
        return steps()

    run.env.step_wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        train(run, print)
    again = set_up(tiny(total_timesteps=100_000), tmp_path / "run", resume=True)
    assert 0 < again.model.num_timesteps <= 300


@pytest.mark.slow
def test_training_ends_when_the_slo_is_met_at_the_energy_aimed_at(tmp_path):
    run = set_up(
        tiny(total_timesteps=4000, evaluation={"every_steps": 128, "workloads": 1, "goal": 1.1}),
        tmp_path / "run",
    )
    train(run, print)
    assert run.evaluate.reached
    assert run.model.num_timesteps < 1000
    missed = set_up(
        tiny(evaluation={"every_steps": 128, "workloads": 1, "goal": 0.1}), tmp_path / "other"
    )
    train(missed, print)
    assert not missed.evaluate.reached
    assert missed.model.num_timesteps == 256


@pytest.mark.slow
def test_margins_are_evaluated_and_the_best_common_one_is_the_default(tmp_path):
    run = set_up(tiny(margins=[0.0, 0.5], anneal=True), tmp_path / "run")
    train(run, print)
    network = load_network(tmp_path / "run" / "best.npz")
    assert network.card["margin"] in (0.0, 0.5)
    assert NumpyPolicy(network, run.env.plant).margin == network.card["margin"]
    assert run.model.lr_schedule(1.0) == pytest.approx(3e-4)
    assert run.model.lr_schedule(0.0) == 0.0


@pytest.mark.slow
def test_nan_stops_with_one_sentence_and_keeps_the_last_good_checkpoint(tmp_path):
    run = set_up(tiny(total_timesteps=2000), tmp_path / "run")
    observe = run.env._observe

    def broken():
        features = observe()
        if run.model.num_timesteps > 200:
            with torch.no_grad():
                next(run.model.policy.mlp_extractor.policy_net.parameters())[0, 0] = float("nan")
        return features

    run.env._observe = broken
    with pytest.raises(BiscaleError, match="is not finite; the last good checkpoint is kept"):
        train(run, print)
    assert all(np.isfinite(w).all() for w in load_network(tmp_path / "run" / "best.npz").weights)


@pytest.mark.slow
def test_deterministic_given_the_seed(tmp_path):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = set_up(tiny(seed=seed), tmp_path / name)
        train(run, print)
        weights.append(to_network(run.model, run.config).weights[0])
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


def test_multipliers_follow_sgd_and_stop_at_their_bounds():
    config = tiny(constraint={"start": 10.0, "rate": 100.0, "maximum": 12.0, "memory": 0.0})
    env = env_of(config)
    callback = Lagrangian(env, np.array([0.99]))
    callback.num_timesteps = 1

    def update(lost):
        tally = env.duals.tally
        tally.finished[:], tally.lost[:], tally.cost[:], tally.time_s[:] = 1000, lost, 50.0, 100.0
        callback.update()
        return float(env.duals.multipliers[0])

    assert update(20) == pytest.approx(10.0 + 100.0 * (0.99 - 0.98))
    assert env.duals.cost_rate[0] == pytest.approx(0.5)
    assert update(500) == 12.0
    for _ in range(40):
        last = update(0)
    assert last == 0.0
    assert len(callback.path) == 42


@pytest.mark.slow
def test_cloning_recovers_a_teacher_that_a_network_can_hold():
    config = tiny(action="clock", net_arch=[32])
    env = env_of(config)
    model = make_model(config, env, None)
    losses = warm_start(
        model,
        env,
        WarmStart(teacher="static:1605", steps=2000, rounds=2, epochs=30),
        print,
    )
    assert losses[-1] < 0.01
    out = model.policy.predict(env.reset(), deterministic=True)[0]
    taught = env.plant.clocks.to_action([1605.0])
    assert np.abs(out - taught).max() < 0.3


def test_plans_with_hindsight_are_data_to_clone():
    """The cloned outputs, added to the rule again, are the clocks of the plan."""
    env = env_of(tiny(span=1.0))
    features, outputs = oracle_data(env, 1)
    group = env.groups[0]
    policy, report = make_oracle(group.plant, group.source.workload(0), group.attainment)
    assert features.shape == (len(outputs), env.dim)
    assert report["feasible"] == 1.0
    rule = features[:, PREFILL_NAMES.index("rule")]
    plan = env.plant.clocks.to_action(policy.plan_mhz)[: len(outputs)]
    assert len(np.unique(plan)) > 1
    assert np.allclose(np.clip(rule + 2.0 * outputs, -1, 1)[: len(plan)], plan, atol=1e-4)


def test_plans_with_foresight_label_the_states_of_anybody():
    """Where the teacher acts, its clocks are those of a run with that foresight, delay included."""
    fixed = {"delay_s": None, "nominal_share": 1.0}
    env = env_of(tiny(span=1.0, n_envs=2, randomise=fixed))
    teacher = LookaheadTeacher("lookahead:seconds=0.5,price=6,reserve=0.1", env)
    env.reset()
    row, number = 0, int(env.workload[0])
    group = env.groups[0]
    planner = LookaheadPlanner(group.plant, group.source.workload(number), 0.5)
    asked_mhz, _ = run_lookahead(planner, PlanWeights(6.0, 0.1))
    wanted = group.plant.clocks.to_action(asked_mhz)
    found = []
    for _ in range(40):
        actions = teacher(env.batch.obs)
        found.append(actions[row])
        env.step_async(output_for(env, actions))
        env.step_wait()
    np.testing.assert_allclose(found, wanted[:40], atol=1e-6)
    assert len(np.unique(found)) > 1
    # anybody's states: after the highest clock there is a plan, too
    env.step_async(output_for(env, np.ones(2, dtype=np.float32)))
    env.step_wait()
    assert np.isfinite(teacher(env.batch.obs)).all()


def test_mistakes_of_the_teacher_with_foresight():
    env = env_of(tiny())
    for name, words in (
        ("lookahead:second=1", "has no parameter 'second'"),
        ("lookahead:reserve=1", "reserve should be less than 1"),
        ("lookahead:seconds=-1", "seconds should be greater than or equal to 0"),
    ):
        with pytest.raises(BiscaleError, match=words):
            LookaheadTeacher(name, env)


def test_outputs_invert_actions():
    env = env_of(tiny(span=1.0))
    env.reset()
    wanted = np.clip(env.rule + np.linspace(-0.5, 0.5, 8).astype(np.float32), -1, 1)
    assert np.allclose(env.to_action(output_for(env, wanted)), wanted, atol=1e-5)


def test_dagger_lets_the_student_act():
    env = env_of(tiny(action="clock"))
    _, wanted = collect(
        env,
        lambda obs: np.full(len(obs), 0.25, np.float32),
        80,
        lambda x: np.full(len(x), -1.0, np.float32),
    )
    assert np.allclose(wanted, 0.25)
    assert (
        env.batch.states["requested_ghz"] == env.plant.clocks.freq_min_mhz / 1e3
    ).all()  # the student's clock, not the teacher's


@pytest.mark.parametrize("algo", SPACES)
def test_the_first_trial_of_a_study_is_the_shipped_config(algo):
    """What the space holds of it comes back from Optuna as it went in."""
    optuna = pytest.importorskip("optuna")
    config = load_config(None, "prefill", algo)
    study = optuna.create_study()
    study.enqueue_trial(starting_point(config))
    found = suggest(study.ask(), config, 10**9)
    for name, value in config.hyper.items():
        same = found.hyper[name] == value
        assert same or found.hyper[name] == pytest.approx(value), name
    assert found.log_std_init == config.log_std_init


def test_a_short_trial_of_policy_iteration_has_several_rounds():
    optuna = pytest.importorskip("optuna")
    config = load_config(None, "prefill", "policy_iteration")
    found = suggest(optuna.create_study().ask(), config, 300_000)
    rounds = 300_000 / (found.hyper["n_steps"] * config.n_envs)
    assert 6 <= rounds < 7


def test_the_rate_that_anneals_is_the_algorithms_own_where_none_is_given():
    for algo, rate in (("ppo", 3e-4), ("dqn", 1e-4)):
        config = tiny(algo, anneal=True)
        model = make_model(config, env_of(config), None)
        assert model.lr_schedule(1.0) == pytest.approx(rate)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_unknown_hyper_parameter_names_the_nearest(algo):
    with pytest.raises(BiscaleError, match="nearest known one is 'learning_rate'"):
        check_hyper(algo, {"learning_rat": 1e-3}, "x.yaml")


def test_bad_configs_are_one_sentence(tmp_path):
    with pytest.raises(BiscaleError, match="unknown algorithm 'a3c'"):
        load_config(None, "prefill", "a3c")
    with pytest.raises(BiscaleError, match="is for prefill, but decode"):
        load_config("prefill-ppo", "decode")
    path = tmp_path / "c.yaml"
    data = tiny().model_dump(mode="json")
    path.write_text(yaml.safe_dump(data | {"n_env": 3}))
    with pytest.raises(BiscaleError, match="nearest known key is 'n_envs'"):
        load_config(path, "prefill")
    path.write_text(yaml.safe_dump(data | {"action": "levels"}))
    with pytest.raises(BiscaleError, match="belong together"):
        load_config(path, "prefill")
    with pytest.raises(BiscaleError, match="refuses its hyper-parameters"):
        make_model(
            tiny(hyper={"n_steps": 16, "batch_size": 64, "learning_rate": "fast"}),
            env_of(tiny()),
            None,
        )
    with pytest.raises(BiscaleError, match="refuses its hyper-parameters"):
        make_model(
            tiny(hyper={"n_steps": 16, "batch_size": 64, "learning_rate": "fast"}, anneal=True),
            env_of(tiny()),
            None,
        )
    path.write_text(yaml.safe_dump(data | {"phase": "decode", "margins": [1.2]}))
    with pytest.raises(BiscaleError, match="input should be less than 1"):
        load_config(path, "decode")


@pytest.mark.parametrize("name", sorted(set(list_names("agents")) - {"cluster", "multi"}))
def test_shipped_configs_are_valid(name):
    assert load_config(name, name.split("-")[0]).n_envs >= 8


@pytest.mark.slow
def test_study_is_stored_and_taken_up(tmp_path):
    config = tiny(hyper={"n_steps": 16, "batch_size": 64})
    best, path = run_study(config, 1, 128, tmp_path)
    again, _ = run_study(config, 1, 128, tmp_path)
    assert again <= best
    assert load_config(path, "prefill").total_timesteps == 256
    trials = pd.read_csv(tmp_path / "trials.csv")
    assert trials["score"].is_monotonic_increasing
    assert trials["number"].tolist() in ([0, 1], [1, 0])
    start = starting_point(
        config.model_copy(update={"hyper": {"n_steps": 64, "batch_size": 7, "gamma": 0.95}})
    )
    assert start == {
        "n_steps": 64,
        "one_minus_gamma": pytest.approx(0.05),
        "log_std_init": config.log_std_init,
    }
    assert "2 trials" in yaml.safe_load(path.read_text())["evidence"]
    with pytest.raises(BiscaleError, match="holds the study 'prefill-ppo'"):
        run_study(tiny("sac"), 1, 128, tmp_path)


@pytest.mark.slow
def test_tensorboard_and_a_line_tell_of_training_from_the_first_rollout(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(live_line.LiveLine.__init__, "__defaults__", (0.0,))
    said = []
    run = set_up(tiny(total_timesteps=512, price=[3.0, 300.0]), tmp_path / "run")
    train(run, said.append)
    lines = [line for line in said if line.startswith("step ")]
    rollout = 8 * HYPER["ppo"]["n_steps"]
    assert lines[0].startswith(f"step {rollout} of 512, energy ")
    for word in ("attainment ", "price ", "entropy ", "steps/s"):
        assert word in lines[-1]
    (folder,) = (tmp_path / "run" / "tensorboard").iterdir()
    told = EventAccumulator(str(folder)).Reload()
    for tag in ("live/energy_ratio", "live/attainment", "live/price", "time/fps"):
        assert told.Scalars(tag)[0].step == rollout, tag
    assert told.Scalars("live/energy_ratio")[0].value == pytest.approx(
        run.evaluate.history[0][1].energy_ratio.mean(), rel=1e-6
    )
    assert told.Scalars("train/entropy_loss")[0].step == 2 * rollout  # learned after the first
