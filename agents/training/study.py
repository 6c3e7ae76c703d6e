"""Hyper-parameter search with Optuna: a stored study, scored by held-out evaluation."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from agents.training.algorithms import default_of
from agents.training.run import EVALUATIONS, set_up, train
from agents.training.train_config import AgentConfig
from biscale_env.config.loader import validate
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.jobs.workers import Workers, in_order

ALONE = Workers()
Suggest = Callable[[Any], Any]
LEAST_ROUNDS = 6  # of policy iteration in a trial
COMMON: dict[str, Suggest] = {
    "learning_rate": lambda t: t.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
    "gamma": lambda t: 1.0 - t.suggest_float("one_minus_gamma", 0.003, 0.1, log=True),
}
CHOICES = {"n_steps": [32, 64, 128, 256], "batch_size": [1024, 2048, 4096]}
SPACES: dict[str, dict[str, Suggest]] = {
    "ppo": COMMON
    | {
        "n_steps": lambda t: t.suggest_categorical("n_steps", CHOICES["n_steps"]),
        "batch_size": lambda t: t.suggest_categorical("batch_size", CHOICES["batch_size"]),
        "n_epochs": lambda t: t.suggest_int("n_epochs", 2, 8),
        "gae_lambda": lambda t: t.suggest_float("gae_lambda", 0.8, 0.98),
        "clip_range": lambda t: t.suggest_float("clip_range", 0.1, 0.3),
    },
    "sac": COMMON | {"tau": lambda t: t.suggest_float("tau", 0.002, 0.05, log=True)},
    "tqc": COMMON | {"tau": lambda t: t.suggest_float("tau", 0.002, 0.05, log=True)},
    "dqn": COMMON
    | {"exploration_fraction": lambda t: t.suggest_float("exploration_fraction", 0.05, 0.5)},
    "recurrent_ppo": COMMON | {"gae_lambda": lambda t: t.suggest_float("gae_lambda", 0.8, 0.98)},
    "policy_iteration": {
        "learning_rate": COMMON["learning_rate"],
        "sample_every": lambda t: t.suggest_int("sample_every", 2, 10),
        "rounds_kept": lambda t: t.suggest_int("rounds_kept", 2, 10),
        "n_epochs": lambda t: t.suggest_int("n_epochs", 2, 12),
    },
}


def suggest(trial: Any, config: AgentConfig, steps: int) -> AgentConfig:
    """Config of one trial."""
    hyper = config.hyper | {name: pick(trial) for name, pick in SPACES[config.algo].items()}
    if config.algo == "policy_iteration":  # rounds so short that there are several
        most = max(steps // (LEAST_ROUNDS * config.n_envs), 1)
        whole = default_of(config.algo, "n_steps")
        hyper["n_steps"] = min(hyper.get("n_steps", whole), most)
    log_std = (
        trial.suggest_float("log_std_init", -2.5, -0.5)
        if config.actor_critic
        else config.log_std_init
    )
    every = {"every_steps": max(steps // 3, 1)}
    changes = {"hyper": hyper, "log_std_init": log_std, "total_timesteps": steps}
    data = config.model_dump() | changes
    return validate(data | {"evaluation": data["evaluation"] | every}, AgentConfig, "trial")


def starting_point(config: AgentConfig) -> dict[str, Any]:
    """The config's own values as parameters of a trial, as far as given and within the space."""
    values: dict[str, Any] = {
        name: config.hyper[name] for name in SPACES[config.algo] if name in config.hyper
    }
    values = {name: v for name, v in values.items() if v in CHOICES.get(name, [v])}
    if "gamma" in values:
        values["one_minus_gamma"] = 1.0 - values.pop("gamma")
    return values | ({"log_std_init": config.log_std_init} if config.actor_critic else {})


def trials_table(study: Any) -> pd.DataFrame:
    """One row per trial, best first: its number, state, score and parameters."""
    frame = study.trials_dataframe(attrs=("number", "state", "value", "params"))
    frame = frame.rename(columns=lambda name: name.removeprefix("params_")).rename(
        columns={"value": "score"}
    )
    return frame.sort_values("score").round(5)


def sampler_for(seed: int, number: int) -> Any:
    """Optuna's TPE sampler of one trial.

    Its generator depends on the trial's number, not on the session: a study of several sessions
    suggests what one long session would, and no session repeats another's start-up trials.

    Args:
        seed: of the study.
        number: trials begun before this one.
    """
    import optuna

    state = np.random.SeedSequence([seed, number]).generate_state(1)
    return optuna.samplers.TPESampler(seed=int(state[0]))


def run_trials(study: Any, objective: Callable[[Any], float], trials: int, seed: int) -> None:
    """Run trials in a study that may have some already."""
    for _ in range(trials):
        begun = sum(t.state.name != "WAITING" for t in study.get_trials(deepcopy=False))
        study.sampler = sampler_for(seed, begun)
        study.optimize(objective, n_trials=1)


def storage_of(out: Path, workers: Workers) -> Any:
    """Optuna's storage of a study: the one that is there, else one that its workers can share.

    SQLite for one process after another; a journal file, which NFS takes too, for several.

    Raises:
        BiscaleError: a study in SQLite is to go on on several machines.
    """
    from optuna.storages import JournalStorage, journal

    database, log = out / "study.db", (out / "study.journal").resolve()
    if database.is_file() and workers.ray is not None:
        raise BiscaleError(
            f"{database} is SQLite, which machines cannot share: choose another --out with --ray"
        )
    if not log.exists() and (database.is_file() or workers.alone):
        return f"sqlite:///{database.resolve()}"
    lock = journal.JournalFileOpenLock(str(log)) if os.name == "nt" else None  # no symbolic links
    return JournalStorage(journal.JournalFileBackend(str(log), lock_obj=lock))


def open_study(config: AgentConfig, out: Path, workers: Workers = ALONE) -> Any:
    """The stored study of a config's phase and algorithm in a directory, made if it is new.

    Raises:
        BiscaleError: the stored study is of another phase or algorithm.
    """
    import optuna

    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = f"{config.phase}-{config.algo}"
    storage = storage_of(out, workers)
    known = optuna.get_all_study_names(storage)
    if known and name not in known:
        raise BiscaleError(
            f"{out} holds the study '{known[0]}', not '{name}': choose another --out"
        )
    study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
    if not study.trials:
        # the config as it is stands in every study, so that the search shows what it is worth
        study.enqueue_trial(starting_point(config))
    return study


def run_trial(trial: Any, config: AgentConfig, steps: int, folder: Path) -> float:
    """Train one trial in a directory of its own; returns its best score.

    Raises:
        optuna.TrialPruned: training broke.
    """
    import optuna

    shutil.rmtree(folder, ignore_errors=True)
    mine = suggest(trial, config, steps)
    run = set_up(mine, folder)
    try:
        train(run, lambda text: None)
    except BiscaleError:
        raise optuna.TrialPruned from None
    trial.set_user_attr("config", mine.model_dump(mode="json"))
    trial.set_user_attr("evaluations", (folder / EVALUATIONS).read_text())
    return run.evaluate.best


def one_trial(config: AgentConfig, steps: int, out: Path, workers: Workers) -> None:
    """One more trial of a stored study, by whichever worker.

    One whose worker was killed stays as ``RUNNING`` and is made up for by another.
    """
    study = open_study(config, out, workers)
    run_trials(
        study, lambda t: run_trial(t, config, steps, out / f"trial-{t.number}"), 1, config.seed
    )


def run_study(
    config: AgentConfig, trials: int, steps: int, out: Path, workers: Workers = ALONE
) -> tuple[float, Path]:
    """Run trials in a stored study; returns the best score and the path of its config.

    With several workers a trial knows of those only that have ended by then, so that the study is
    another than that of one process. On a cluster ``out`` has to be seen by every node.

    Raises:
        BiscaleError: the stored study is of another phase or algorithm, or no trial succeeded.
    """
    out = out.absolute()
    study = open_study(config, out, workers)
    in_order(one_trial, [(config, steps, out, workers)] * trials, workers)
    write_whole(out / "trials.csv", trials_table(study).to_csv(index=False))
    try:
        best = study.best_trial
    except ValueError:
        raise BiscaleError(
            f"no trial of {out} succeeded: lower the learning rates of the config"
        ) from None
    found = dict(best.user_attrs["config"])
    found |= {
        "total_timesteps": config.total_timesteps,
        "evaluation": config.evaluation.model_dump(mode="json"),
    }
    found["evidence"] = (
        f"Optuna study {study.study_name}: {len(study.trials)} trials of {steps} steps, best "
        f"held-out score {best.value:.4f}"
    )
    write_whole(out / "best.yaml", yaml.safe_dump(found, sort_keys=False))
    return float(best.value or 0.0), out / "best.yaml"
