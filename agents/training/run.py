"""A training run: SB3's algorithm on the randomised native environment, in a directory that
explains and resumes itself.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from agents.policy.feature_parts import Floats32
from agents.policy.features import NominalModel
from agents.policy.sb3_policy import SPEC_FILE, Sb3Policy
from agents.training.algorithms import algorithm
from agents.training.callbacks import Evaluate, FiniteGuard, Lagrangian
from agents.training.clone import warm_start
from agents.training.export import to_network
from agents.training.heldout import HeldOut, HeldoutMetrics
from agents.training.logs import (
    read_evaluations,
    read_path,
    write_evaluations,
    write_path,
)
from agents.training.mixture import make_groups, targets
from agents.training.train_config import AgentConfig
from agents.training.training_env import AgentVecEnv
from biscale_env.config.loader import validate
from biscale_env.contract import spec_for
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import open_whole, write_whole
from controllers.base import context_of
from controllers.registry import make_policy

CONFIG, STATE, LAST, BEST, BEST_ZIP, EVALUATIONS, MULTIPLIERS = (
    "config.yaml",
    "state.json",
    "last.zip",
    "best.npz",
    "best.zip",
    "evaluations.csv",
    "multipliers.csv",
)
Report = Callable[[str], None]


@dataclass
class TrainingRun:
    """A training run that is set up.

    Attributes:
        folder: its directory.
        config: its config.
        env: the training environment.
        model: the SB3 model.
        lagrangian: moves the multipliers.
        evaluate: evaluates and saves.
    """

    folder: Path
    config: AgentConfig
    env: AgentVecEnv
    model: Any
    lagrangian: Lagrangian
    evaluate: Evaluate


def open_folder(folder: Path, config: AgentConfig, resume: bool) -> None:
    """Create the run directory, or take up an interrupted run.

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
        changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        if changed:
            k = changed[0]
            raise BiscaleError(
                f"cannot resume {folder}: '{k}' was {old.get(k)} and is now {new.get(k)}; use the same config"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(known, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_whole(folder / SPEC_FILE, spec_for(config.phase).id + "\n")


def _known_config(path: Path) -> dict[str, Any]:
    """The config of a run directory in today's form; what cannot be read so, as it stands there."""
    found = yaml.safe_load(path.read_text())
    try:
        return validate(found, AgentConfig, str(path)).model_dump(mode="json")
    except BiscaleError:
        return dict(found or {})


def make_model(config: AgentConfig, env: AgentVecEnv, folder: Path | None) -> Any:
    """The SB3 model of a config.

    Raises:
        BiscaleError: SB3 refuses a hyper-parameter's value.
    """
    import torch
    from stable_baselines3.common.utils import LinearSchedule

    torch.set_num_threads(1)
    activation = torch.nn.Tanh if config.activation == "tanh" else torch.nn.ReLU
    kwargs: dict[str, Any] = {"net_arch": list(config.net_arch), "activation_fn": activation}
    if config.algo in ("ppo", "recurrent_ppo"):
        kwargs |= {
            "net_arch": {"pi": list(config.net_arch), "vf": list(config.net_arch)},
            "log_std_init": config.log_std_init,
        }
    policy = "MlpLstmPolicy" if config.algo == "recurrent_ppo" else "MlpPolicy"
    log = None if folder is None else str(folder / "tensorboard")
    hyper = dict(config.hyper)
    try:
        if config.anneal:
            hyper["learning_rate"] = LinearSchedule(
                float(hyper.get("learning_rate", 3e-4)), 0.0, 1.0
            )
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
        raise BiscaleError(
            f"{config.algo} refuses its hyper-parameters: {str(error).splitlines()[0]}"
        ) from None


class HeldOutPolicy(Sb3Policy):
    """The model's deterministic policy on the held-out rows, each in its own group's plant.

    Recurrent ones carry their memory along. ``price`` and ``margin`` are set by the evaluation.
    """

    def __init__(self, model: Any, config: AgentConfig, held_out: HeldOut) -> None:
        """Bind the model to the rows."""
        super().__init__(model, config, held_out.plant)
        self._nominal = NominalModel(held_out.coefs, held_out.cheapest_ghz)
        self._state: Any = None

    def __call__(self, obs: Floats32, start: bool) -> Floats32:
        """Actions (n,)."""
        state = None if start else self._state
        action, self._state = self.predict(obs, state, np.full(len(obs), start))
        return action[:, 0]


def set_up(config: AgentConfig, folder: Path, resume: bool = False) -> TrainingRun:
    """Everything of a run, from nothing or from its last good checkpoint."""
    open_folder(folder, config, resume)
    groups, counts = make_groups(config)
    env = AgentVecEnv(config, groups, counts, config.seed)
    goals = targets(config, groups, env.lost_at_max)
    held_out = HeldOut(config, groups, config.evaluation.workloads)
    state: dict[str, Any] = {}
    if resume and (folder / LAST).is_file():
        model = load_model(folder / LAST, config.algo, env)
        state = json.loads((folder / STATE).read_text())
        env.multipliers, env.cost_rate = (
            np.array(state["multipliers"]),
            np.array(state["cost_rate"]),
        )
    else:
        model = make_model(config, env, folder)
    lagrangian = Lagrangian(env, goals, config)
    names = [g.name for g in groups]
    run = TrainingRun(
        folder,
        config,
        env,
        model,
        lagrangian,
        Evaluate(
            config,
            held_out,
            held_out.targets,
            names,
            HeldOutPolicy(model, config, held_out),
            _nothing,
        ),
    )
    if state:
        run.evaluate.take_up(
            state["best"], state.get("worse", 0), read_evaluations(folder / EVALUATIONS)
        )
        lagrangian.path = read_path(folder / MULTIPLIERS)
    run.evaluate.save = lambda best, step, figures: save(run, best, step, figures)
    return run


def _nothing(best: bool, step: int, figures: HeldoutMetrics) -> None:
    """Placeholder until the run exists."""


def load_model(path: Path, algo: str, env: AgentVecEnv | None = None) -> Any:
    """An SB3 model from its zip.

    Raises:
        BiscaleError: the file is missing, corrupt, or does not fit the environment.
    """
    if not path.is_file():
        raise BiscaleError(f"checkpoint {path} does not exist")
    try:
        return algorithm(algo).load(path, env=env, device="cpu")
    except Exception as error:  # SB3 raises many kinds here: bad zip, pickle, spaces that differ
        raise BiscaleError(
            f"checkpoint {path} cannot be loaded: {str(error).splitlines()[0] if str(error) else 'corrupt'}"
        ) from None


def save(run: TrainingRun, best: bool, step: int, figures: HeldoutMetrics) -> None:
    """Write the resumable state, and the best policy when this is it."""
    folder, names = run.folder, run.evaluate.names
    with open_whole(folder / LAST) as temporary:
        run.model.save(temporary)
    state = {
        "step": step,
        "best": run.evaluate.best,
        "worse": run.evaluate.worse,
        "multipliers": run.env.multipliers.tolist(),
        "cost_rate": run.env.cost_rate.tolist(),
        "groups": names,
    }
    write_whole(folder / STATE, json.dumps(state, indent=1))
    write_path(run.lagrangian.path, names, folder / MULTIPLIERS)
    write_evaluations(run.evaluate.history, names, folder / EVALUATIONS)
    if best:
        with open_whole(folder / BEST_ZIP) as temporary:
            run.model.save(temporary)
        if run.config.algo != "recurrent_ppo":
            to_network(run.model, run.config, _card(run, step, figures), run.evaluate.price).save(
                folder / BEST
            )


def _card(run: TrainingRun, step: int, figures: HeldoutMetrics) -> dict[str, Any]:
    held_out = {
        name: {
            "energy_ratio": round(float(e), 4),
            "attainment": round(float(a), 5),
            "target": round(float(t), 5),
        }
        for name, e, a, t in zip(
            run.evaluate.names,
            figures.energy_ratio,
            figures.attainment,
            run.evaluate.targets,
            strict=True,
        )
    }
    return {
        "algo": run.config.algo,
        "seed": run.config.seed,
        "steps": step,
        "margin": run.evaluate.margin,
        "held_out": held_out,
        "config": run.config.model_dump(mode="json"),
    }


def train(run: TrainingRun, report: Report, progress: bool = False) -> HeldoutMetrics:
    """Warm start (unless resumed), then learn; the last good state is on disk whatever happens.

    Returns the last figures.

    Raises:
        BiscaleError: a value that is not finite.
    """
    config, model = run.config, run.model
    if config.warm_start is not None and model.num_timesteps == 0:
        teacher = make_policy(config.warm_start.teacher, context_of(run.env.plant))
        warm_start(
            model, run.env, lambda obs: teacher.predict(obs)[0][:, 0], config.warm_start, report
        )
        model._last_obs = None
    left = config.total_timesteps - model.num_timesteps
    guard = FiniteGuard()
    try:
        if left > 0:
            model.learn(
                left, callback=[guard, run.lagrangian, run.evaluate], progress_bar=progress,
                reset_num_timesteps=model.num_timesteps == 0, log_interval=5, tb_log_name="run",
            )  # fmt: skip
    except ValueError:  # torch refuses distributions that are not finite, within a rollout
        guard.check()
        raise
    except KeyboardInterrupt:
        saved = (run.folder / LAST).is_file()
        what = (
            "the state of the last evaluation is kept"
            if saved
            else "nothing is saved before the first evaluation"
        )
        report(
            f"interrupted at step {model.num_timesteps}: {what}; go on with --resume --out {run.folder}"
        )
        raise
    return run.evaluate.evaluate() if left > 0 else run.evaluate.at_best_setting()
