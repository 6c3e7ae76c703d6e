"""A training run: SB3's algorithm on the randomised native environment, in one directory.

The directory explains itself (config, observation, training plant, evaluations) and resumes:
``last.zip`` is SB3's model with the state of everything else beside the weights in the same file,
so that the two are always of one moment. A resumed run of an on-policy algorithm goes on bit for
bit as if it had never been interrupted; off-policy ones begin with an empty replay buffer.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from stable_baselines3.common.vec_env import VecEnv

from agents.policy.sb3_policy import SPEC_FILE, TRAINED_ON_FILE
from agents.training.algorithms import algorithm, default_of
from agents.training.clone import warm_start
from agents.training.export import BEST, to_network, training_facts
from agents.training.heldout import HeldOut, HeldoutMetrics
from agents.training.policy_on_rows import HeldOutPolicy
from agents.training.progress.callbacks import Checkpoint, Evaluate, FiniteGuard, Lagrangian
from agents.training.progress.live_line import LiveLine
from agents.training.progress.logs import write_evaluations, write_path
from agents.training.run_state import Keeper, RunState, TrainingRun, read_state
from agents.training.train_config import AgentConfig
from agents.training.worlds.mixture import make_groups, targets
from agents.training.worlds.training_env import AgentVecEnv
from biscale_env.config.loader import read_yaml, validate
from biscale_env.contract import spec_for
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import lock, open_whole, write_whole

CONFIG, STATE, LAST, BEST_ZIP, EVALUATIONS, MULTIPLIERS, LOCK = (
    "config.yaml",
    "state.json",
    "last.zip",
    "best.zip",
    "evaluations.csv",
    "multipliers.csv",
    ".lock",
)
Report = Callable[[str], None]
STORE_EVERY_S = 60.0  # a run that is killed loses at most this and one rollout


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes off a run directory while one trains in it.

    Raises:
        BiscaleError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / LOCK, what=f"training run {folder}"):
        yield


def open_folder(folder: Path, config: AgentConfig, resume: bool) -> None:
    """Create the run directory, or resume an interrupted run, or extend one to more steps.

    Raises:
        BiscaleError: a run is there and resume was not asked for, there is none to resume, or its
            config was another.
    """
    known = folder / CONFIG
    if resume and not known.is_file():
        raise BiscaleError(f"{folder} holds no training run to resume")
    if known.is_file():
        if not resume:
            raise BiscaleError(
                f"{folder} holds a training run already: add --resume or choose another --out"
            )
        old, new = _known_config(known), config.model_dump(mode="json")
        changed = sorted(
            k
            for k in old.keys() | new.keys()
            if old.get(k) != new.get(k) and not _longer(k, old, new)
        )
        if changed:
            k = changed[0]
            raise BiscaleError(
                f"cannot resume {folder}: '{k}' was {old.get(k)} and is now {new.get(k)}; use the "
                "same config"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(known, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_whole(folder / SPEC_FILE, spec_for(config.phase).id + "\n")


def _longer(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a key differs only in that the run goes on for more steps."""
    return key == "total_timesteps" and new[key] > old.get(key, np.inf)


def _known_config(path: Path) -> dict[str, Any]:
    """The config of a run directory in today's form; what cannot be read so, as it stands there.

    Raises:
        BiscaleError: the file is empty, cut off or no YAML.
    """
    found = read_yaml(path)
    if not isinstance(found, dict):
        raise BiscaleError(f"{path} is empty or damaged: restore it or choose another --out")
    try:
        return validate(found, AgentConfig, str(path)).model_dump(mode="json")
    except BiscaleError:
        return dict(found)


def make_model(config: AgentConfig, env: VecEnv, folder: Path | None) -> Any:
    """The SB3 model of a config.

    Raises:
        BiscaleError: SB3 refuses a hyper-parameter's value.
    """
    import torch
    from stable_baselines3.common.utils import LinearSchedule

    torch.set_num_threads(1)
    activation = torch.nn.Tanh if config.activation == "tanh" else torch.nn.ReLU
    kwargs: dict[str, Any] = {"net_arch": list(config.net_arch), "activation_fn": activation}
    if config.actor_critic:
        layers = list(config.net_arch)
        kwargs |= {"net_arch": {"pi": layers, "vf": layers}, "log_std_init": config.log_std_init}
    policy = "MlpLstmPolicy" if config.algo == "recurrent_ppo" else "MlpPolicy"
    log = None if folder is None else str(folder / "tensorboard")
    hyper = dict(config.hyper)
    try:
        if config.anneal:
            rate = float(hyper.get("learning_rate", default_of(config.algo, "learning_rate")))
            hyper["learning_rate"] = LinearSchedule(rate, 0.0, 1.0)
        return algorithm(config.algo)(
            policy,
            env,
            seed=config.seed,
            device=config.device,
            policy_kwargs=kwargs,
            tensorboard_log=log,
            **hyper,
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BiscaleError(f"{config.algo} refuses its hyper-parameters: {reason}") from None


def set_up(config: AgentConfig, folder: Path, resume: bool = False) -> TrainingRun:
    """Everything of a run, from nothing or from its last resumable moment.

    Whoever trains in a directory that others may know should hold :func:`claimed` meanwhile.

    Raises:
        BiscaleError: see :func:`open_folder`; or the stored state cannot be read.
    """
    began_s = time.process_time()
    open_folder(folder, config, resume)
    groups, counts = make_groups(config)
    env = AgentVecEnv(config, groups, counts, config.seed)
    goals = targets(config, groups, env.workloads.late_at_max)
    held_out = HeldOut(config, groups, config.evaluation.workloads)
    state = read_state(folder / LAST) if resume and (folder / LAST).is_file() else None
    model = make_model(config, env, folder) if state is None else load_model(folder, config, env)
    names = [g.name for g in groups]
    write_whole(folder / TRAINED_ON_FILE, json.dumps(training_facts(config, env.plant), indent=1))
    evaluate = Evaluate(config, held_out, names, HeldOutPolicy(model, config, held_out), _nothing)
    run = TrainingRun(folder, config, env, model, Lagrangian(env, goals), evaluate, state, began_s)
    evaluate.save = lambda best, step, metrics: save(run, best, step, metrics)
    if state is not None:
        state.restore(run)
    return run


def _nothing(best: bool, step: int, metrics: HeldoutMetrics) -> None:
    """Placeholder until the run exists."""


def load_model(folder: Path, config: AgentConfig, env: AgentVecEnv | None = None) -> Any:
    """The SB3 model of a run's ``last.zip``.

    Raises:
        BiscaleError: the file is missing, corrupt, or does not fit the environment.
    """
    path = folder / LAST
    if not path.is_file():
        raise BiscaleError(f"checkpoint {path} does not exist")
    try:
        return algorithm(config.algo).load(path, env=env, device=config.device, force_reset=False)
    except Exception as error:  # SB3 raises many kinds here: bad zip, pickle, spaces that differ
        reason = str(error).splitlines()[0] if str(error) else "corrupt"
        raise BiscaleError(f"checkpoint {path} cannot be loaded: {reason}") from None


def store(run: TrainingRun, state: RunState) -> None:
    """Write the resumable file, and the logs that people read."""
    folder, names, duals = run.folder, run.evaluate.names, run.env.duals
    with open_whole(folder / LAST) as temporary:
        run.model.save(temporary)
        state.append_to(temporary)
    summary = {
        "step": run.model.num_timesteps,
        "cpu_minutes": _minutes(state.cpu_s),
        "best": run.evaluate.best,
        "worse": run.evaluate.worse,
        "multipliers": duals.multipliers.tolist(),
        "cost_rate": duals.cost_rate.tolist(),
        "groups": names,
    }
    write_whole(folder / STATE, json.dumps(summary, indent=1))
    write_path(run.lagrangian.path, names, folder / MULTIPLIERS)
    write_evaluations(run.evaluate.history, names, folder / EVALUATIONS)


def _minutes(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds / 60.0, 3)


def save(run: TrainingRun, best: bool, step: int, metrics: HeldoutMetrics) -> None:
    """Write the resumable state, and the best policy when this is it."""
    store(run, RunState.of(run))
    if not best:
        return
    with open_whole(run.folder / BEST_ZIP) as temporary:
        run.model.save(temporary)
    if run.config.algo != "recurrent_ppo":
        facts = training_facts(run.config, run.env.plant)
        card = _card(run, step, metrics)
        network = to_network(run.model, run.config, card, run.evaluate.price, facts)
        network.save(run.folder / BEST)


def _card(run: TrainingRun, step: int, metrics: HeldoutMetrics) -> dict[str, Any]:
    held_out = {
        name: {
            "energy_ratio": round(float(e), 4),
            "attainment": round(float(a), 5),
            "target": round(float(t), 5),
        }
        for name, e, a, t in zip(
            run.evaluate.names,
            metrics.energy_ratio,
            metrics.attainment,
            run.evaluate.targets,
            strict=True,
        )
    }
    return {
        "algo": run.config.algo,
        "seed": run.config.seed,
        "steps": step,
        "cpu_minutes": _minutes(run.cpu_s),
        "margin": run.evaluate.margin,
        "held_out": held_out,
        "config": run.config.model_dump(mode="json"),
    }


def train(run: TrainingRun, report: Report, progress: bool = False) -> HeldoutMetrics:
    """Warm start (unless resumed), then learn; the last good state is on disk whatever happens.

    Returns the last metrics.

    Raises:
        BiscaleError: a value that is not finite.
    """
    config, model = run.config, run.model
    if config.warm_start is not None and run.state is None:
        warm_start(model, run.env, config.warm_start, report)
        model._last_obs = None
    left = config.total_timesteps - model.num_timesteps
    if left <= 0:
        return run.evaluate.at_best_setting()
    keeper, guard = Keeper(run), FiniteGuard()
    checkpoint = Checkpoint(keeper.remember, _now_and_then(run))
    live = LiveLine(run.env, run.evaluate, config.total_timesteps, report)
    callbacks = [guard, run.lagrangian, run.evaluate, checkpoint, live]
    if run.state is not None:
        run.state.restore_generators(run)
    try:
        model.learn(
            left,
            callback=callbacks,
            progress_bar=progress,
            reset_num_timesteps=run.state is None,
            log_interval=1 if config.actor_critic else 5,  # rollouts, or episodes
            tb_log_name="run",
        )
    except ValueError:  # torch refuses distributions that are not finite, within a rollout
        guard.check()
        raise
    except KeyboardInterrupt:
        _interrupted(run, keeper, report)
        raise
    return run.evaluate.evaluate()


def _now_and_then(run: TrainingRun) -> Callable[[], None]:
    """What stores a run when the last time is long ago."""
    last_s = time.monotonic()

    def due() -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= STORE_EVERY_S:
            store(run, RunState.of(run))
            last_s = time.monotonic()

    return due


def _interrupted(run: TrainingRun, keeper: Keeper, report: Report) -> None:
    """Store the last resumable moment and say so."""
    step = run.model.num_timesteps
    state = keeper.last()
    if state is None:
        report(f"interrupted at step {step}, before the first rollout: nothing is saved")
        return
    store(run, state)
    report(
        f"interrupted at step {step}: step {run.model.num_timesteps} is kept; go on with "
        f"--resume --out {run.folder}"
    )
