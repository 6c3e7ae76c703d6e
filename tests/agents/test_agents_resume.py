"""An interrupted run that is resumed is the run that was never interrupted."""

import copy
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("stable_baselines3")
optuna = pytest.importorskip("optuna")

from agents.training import run as run_module  # noqa: E402
from agents.training.run import claimed, set_up, train  # noqa: E402
from agents.training.run_config import new_folder  # noqa: E402
from agents.training.run_state import MEMBER, RunState, TrainingRun, read_state  # noqa: E402
from agents.training.study import open_study, run_trials, sampler_for, suggest  # noqa: E402
from agents.training.train_config import AgentConfig, load_config  # noqa: E402
from biscale_env.core.errors import BiscaleError  # noqa: E402

PRICED = {
    "price": [1, 200],
    "warm_start": {"teacher": "mpc:margin=0.2", "steps": 200, "rounds": 2, "epochs": 2},
}
COSTS = {
    "algo": "policy_iteration",
    "price": [1, 200],
    "hyper": {"n_steps": 16, "sample_every": 4, "clocks": 5, "rounds_kept": 2, "batch_size": 16},
}
DECODE = {
    "phase": "decode",
    "mixture": [{"rates_rps": [15.0], "workloads": 2, "episode_s": 20.0}],
}


def tiny(**changes):
    base = {
        "phase": "prefill", "algo": "ppo", "n_envs": 8, "total_timesteps": 1024, "net_arch": [16],
        "hyper": {"n_steps": 16, "batch_size": 64, "n_epochs": 2}, "anneal": True,
        "mixture": [{"rates_rps": [2.0, 3.0], "workloads": 2, "episode_s": 30.0}],
        "evaluation": {"every_steps": 400, "workloads": 1},
        "constraint": {"rate": 5000.0},
    }  # fmt: skip
    return AgentConfig.model_validate(base | changes)


def weights(run):
    return {k: v.numpy().copy() for k, v in run.model.policy.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[k], b[k]) for k in a)


def interrupt(run, after):
    """Train until the environment has been stepped ``after`` times, then Ctrl-C."""
    steps, count, said = run.env.step_wait, 0, []

    def broken():
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return steps()

    run.env.step_wait = broken
    with pytest.raises(KeyboardInterrupt):
        train(run, said.append)
    return said[-1]


def test_processor_time_adds_up_over_interruptions(monkeypatch):
    parts = dict.fromkeys(("folder", "config", "env", "model", "lagrangian", "evaluate"))
    kept = RunState({}, {}, [], {}, {}, cpu_s=100.0)
    monkeypatch.setattr("agents.training.run_state.time.process_time", lambda: 12.0)
    assert TrainingRun(**parts, state=kept, began_s=5.0).cpu_s == 107.0
    assert TrainingRun(**parts, began_s=5.0).cpu_s == 7.0
    of_before = RunState({}, {}, [], {}, {})  # of a version that did not keep it
    assert TrainingRun(**parts, state=of_before, began_s=5.0).cpu_s is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, PRICED, DECODE, COSTS], ids=["multipliers", "priced", "decode", "costs"]
)
def test_interrupted_and_resumed_is_the_straight_run_bit_for_bit(tmp_path, monkeypatch, changes):
    monkeypatch.setattr("agents.training.progress.callbacks.MIN_REQUESTS", 5)
    config = tiny(**changes)
    straight = set_up(config, tmp_path / "straight")
    train(straight, print)
    folder = tmp_path / "broken"
    warm = 2 * (200 // 8) if "warm_start" in changes else 0
    said = interrupt(set_up(config, folder), warm + 40)  # in the third rollout
    assert "step 256 is kept" in said
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - another process would not have these generators
    interrupt(set_up(config, folder, resume=True), 60)
    again = set_up(config, folder, resume=True)
    assert 256 < again.model.num_timesteps < 1024
    object.__setattr__(again.state, "cpu_s", 6000.0)  # as if it had begun long ago
    train(again, print)
    assert read_state(folder / "last.zip").cpu_s > 6000.0
    assert json.loads((folder / "state.json").read_text())["cpu_minutes"] > 100.0
    assert again.model.num_timesteps == straight.model.num_timesteps == 1024
    assert same(weights(again), weights(straight))
    a, b = again.env.duals, straight.env.duals
    assert a.updates == b.updates > 2
    for name in ("multipliers", "cost_rate", "attainment"):
        assert np.array_equal(getattr(a, name), getattr(b, name))
    assert np.array_equal(again.env.shaper.spread.squares, straight.env.shaper.spread.squares)
    for name in ("evaluations.csv", "multipliers.csv"):
        assert (folder / name).read_text() == (tmp_path / "straight" / name).read_text()


@pytest.mark.slow
def test_a_finished_run_is_extended_by_asking_for_more_steps(tmp_path):
    """Everything before stays as it was; fewer steps than before are another run."""
    train(set_up(tiny(), tmp_path), print)
    before = read_state(tmp_path / "last.zip")
    longer = set_up(tiny(total_timesteps=2048), tmp_path, resume=True)
    assert longer.model.num_timesteps == 1024
    train(longer, print)
    assert longer.model.num_timesteps == 2048
    after = read_state(tmp_path / "last.zip")
    assert after.path[: len(before.path)] == before.path
    assert len(after.path) > len(before.path)
    with pytest.raises(BiscaleError, match="'total_timesteps' was 2048 and is now 512"):
        set_up(tiny(total_timesteps=512), tmp_path, resume=True)


@pytest.mark.slow
def test_interrupted_before_the_second_evaluation_keeps_what_was_learned(tmp_path):
    config = tiny(**PRICED, evaluation={"every_steps": 100_000, "workloads": 1})
    first = set_up(config, tmp_path / "run")
    interrupt(first, 2 * (200 // 8) + 40)
    again = set_up(config, tmp_path / "run", resume=True)
    assert again.model.num_timesteps == 256
    assert len(again.evaluate.history) == 1
    said = []
    train(again, said.append)
    assert not [line for line in said if not line.startswith("step ")], "no second warm start"


@pytest.mark.slow
def test_interrupted_right_after_the_warm_start_is_not_warmed_again(tmp_path):
    config = tiny(**PRICED)
    first = set_up(config, tmp_path / "run")
    interrupt(first, 2 * (200 // 8) + 3)
    again = set_up(config, tmp_path / "run", resume=True)
    assert again.model.num_timesteps == 0
    said = []
    train(again, said.append)
    assert not [line for line in said if not line.startswith("step ")], "no second warm start"


@pytest.mark.slow
def test_interrupted_in_the_warm_start_says_that_nothing_is_kept(tmp_path):
    config = tiny(**PRICED)
    run = set_up(config, tmp_path / "run")
    run.env.step_wait = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train(run, print)
    assert not (tmp_path / "run" / "last.zip").exists()
    assert set_up(config, tmp_path / "run", resume=True).state is None


@pytest.mark.slow
def test_a_killed_run_loses_at_most_the_time_between_two_stores(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "STORE_EVERY_S", 0.0)
    config = tiny(evaluation={"every_steps": 100_000, "workloads": 1}, total_timesteps=512)
    run = set_up(config, tmp_path / "run")
    stored = []
    monkeypatch.setattr(
        run_module, "store", lambda run, state: stored.append(run.model.num_timesteps)
    )
    train(run, print)
    assert stored == [0, 0, 128, 256, 384, 512], "after each evaluation and before every rollout"


def test_state_of_an_environment_goes_on_bit_for_bit():
    from agents.training.worlds.mixture import make_groups
    from agents.training.worlds.training_env import AgentVecEnv

    for changes in ({}, DECODE, {"price": [1, 200]}):
        config = tiny(**changes)
        env, other = (AgentVecEnv(config, *make_groups(config), seed) for seed in (3, 4))
        env.reset(), other.reset()
        outputs = np.random.default_rng(0).uniform(-1, 1, (60, 8, 1)).astype(np.float32)

        def go(env, outputs):
            for output in outputs:
                env.step_async(output)
                yield env.step_wait()[:3]

        list(go(env, outputs[:30]))
        other.restore(env.state())
        for a, b in zip(go(env, outputs[30:]), go(other, outputs[30:]), strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "last.zip", "w") as file:
        file.writestr("data", "{}")
    with pytest.raises(BiscaleError, match="written by another version, which this one cannot"):
        read_state(tmp_path / "last.zip")
    RunState({}, {}, [], {}, {}).append_to(tmp_path / "last.zip")
    assert read_state(tmp_path / "last.zip").path == []
    with zipfile.ZipFile(tmp_path / "last.zip") as file:
        assert file.namelist() == ["data", MEMBER]
    (tmp_path / "last.zip").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(BiscaleError, match="cannot be loaded"):
        read_state(tmp_path / "last.zip")


def test_a_live_run_is_not_resumed_beside_itself(tmp_path):
    with (
        claimed(tmp_path / "run"),
        pytest.raises(BiscaleError, match=r"training run .* is in use by another process"),
        claimed(tmp_path / "run"),
    ):
        pass
    with claimed(tmp_path / "run"):
        pass


def make_one(args):
    folder, barrier_s = args
    time.sleep(max(barrier_s - time.time(), 0.0))
    return str(new_folder(folder))


@pytest.mark.slow
def test_directories_made_at_once_differ(tmp_path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        made = pool.map(make_one, [(tmp_path / "runs" / "train-x", time.time() + 1.5)] * 8)
    assert sorted(made) == sorted(
        str(tmp_path / "runs" / ("train-x" + (f"-{k}" if k > 1 else ""))) for k in range(1, 9)
    )


@pytest.mark.slow
def test_resume_beside_a_live_run_is_one_sentence_and_exit_2(tmp_path):
    config = tmp_path / "c.yaml"
    text = tiny(total_timesteps=10_000_000).model_dump_json()
    config.write_text(text)
    argv = [sys.executable, "-m", "biscale_env.cli", "train", "prefill", "--config", str(config)]
    argv += ["--out", str(tmp_path / "run")]
    live = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.time() + 120
        while not (tmp_path / "run" / "last.zip").exists() and time.time() < deadline:
            time.sleep(0.2)
            assert live.poll() is None
        other = subprocess.run([*argv, "--resume"], capture_output=True, text=True, check=False)
        assert other.returncode == 2
        assert "is in use by another process" in other.stderr + other.stdout
        assert "Traceback" not in other.stderr
    finally:
        os.kill(live.pid, signal.SIGKILL)
        live.wait()
    with claimed(tmp_path / "run"):
        assert (
            set_up(AgentConfig.model_validate_json(text), tmp_path / "run", resume=True).state
            is not None
        )


def suggestions(folder, sessions):
    config = tiny(hyper={"n_steps": 64, "batch_size": 1024})
    for trials in sessions:
        study = open_study(config, folder)

        def objective(trial):
            mine = suggest(trial, config, 1000)
            return float(mine.hyper["learning_rate"]) + mine.hyper["n_epochs"]

        run_trials(study, objective, trials, seed=5)
    return [t.params for t in study.trials]


@pytest.mark.slow
def test_sessions_of_a_study_suggest_what_one_long_session_does(tmp_path):
    """Below Optuna's 10 start-up trials, too, where a sampler seeded anew would repeat itself."""
    one = suggestions(tmp_path / "one", [14])
    three = suggestions(tmp_path / "three", [2, 3, 9])
    assert one == three
    rates = [p["learning_rate"] for p in one]
    assert len(set(rates)) == len(rates) == 14


def test_every_trial_has_a_generator_of_its_own():
    space = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
    study = optuna.create_study()

    def first(seed, number):
        study.sampler = sampler_for(seed, number)
        return study.ask(space).params["x"]

    assert first(1, 2) == first(1, 2)
    assert len({first(seed, number) for seed in range(3) for number in range(3)}) == 9


@pytest.mark.parametrize("content", [b"", b"\x00\xff: [", b"phase: [cut", b"just words"])
def test_a_damaged_config_of_a_run_directory_is_one_sentence(tmp_path, content):
    from agents.training.run import open_folder

    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(BiscaleError, match=r"config\.yaml"):
        open_folder(tmp_path, load_config(None, "decode"), resume=True)


@pytest.mark.parametrize("content", ["", "ste", "\x00"])
def test_a_damaged_log_of_evaluations_is_one_sentence(tmp_path, content):
    from agents.training.progress.curves import learning_curves

    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / "evaluations.csv").write_text(content)
    with pytest.raises(BiscaleError, match=r"evaluations\.csv is empty or damaged"):
        learning_curves(tmp_path)


def test_a_policy_through_sb3_pickles_and_decides_the_same(tmp_path):
    from agents.policy.sb3_policy import Sb3Policy
    from agents.training.run import make_model
    from agents.training.worlds.mixture import make_groups
    from agents.training.worlds.training_env import AgentVecEnv

    config = tiny(price=[1, 200])
    env = AgentVecEnv(config, *make_groups(config), 0)
    env.reset()
    policy = Sb3Policy(make_model(config, env, None), config, env.plant)
    rows = env.batch.obs.copy()
    for twin in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
        assert np.array_equal(twin.predict(rows)[0], policy.predict(rows)[0])
