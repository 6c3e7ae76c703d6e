"""``biscale train`` and ``biscale tune``: learned agents on Stable-Baselines3."""

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biscale_env.cli.instance_options import (
    EpDegree,
    GpuName,
    IdlePower,
    InstanceFile,
    LlmName,
    ModelName,
    TpDegree,
    instance_changes,
)
from biscale_env.core.errors import BiscaleError

if TYPE_CHECKING:
    from agents.training.train_config import AgentConfig


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("train")(train)
    app.command("tune")(tune)


def _need_rl() -> None:
    try:
        import stable_baselines3  # noqa: F401
        import torch  # noqa: F401
    except ImportError:
        raise BiscaleError(
            "training needs torch and stable-baselines3: install biscale-env[rl]"
        ) from None


def train(
    phase: Annotated[str, typer.Argument(help="prefill or decode")],
    *,
    algo: Annotated[
        str | None, typer.Option(help="ppo, sac, tqc, dqn or recurrent_ppo. [default: ppo]")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Config name or YAML file; default: the shipped one.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Env steps instead of the config's.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="First training seed instead of the config's.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Train this many seeds, one after the other.")] = 1,
    gpu: GpuName = None,
    llm: LlmName = None,
    model: ModelName = None,
    tp: TpDegree = None,
    ep: EpDegree = None,
    instance: InstanceFile = None,
    idle: IdlePower = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory; default: runs/train-<time>-<phase>-<algo>.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out.")] = False,
) -> None:
    """Train an agent.

    Every seed has a directory of its own with config, checkpoints, TensorBoard log and evaluations.
    """
    _need_rl()
    from agents.training.run import new_folder
    from agents.training.train_config import AgentConfig, load_config
    from biscale_env.config.loader import validate
    from biscale_env.models import instance_hardware

    if seeds < 1:
        raise BiscaleError(f"--seeds must be at least 1, got {seeds}")
    if resume and out is None:
        raise BiscaleError("--resume needs the directory of the run: give it with --out")
    base = load_config(config, phase, algo)
    given = instance_changes(
        instance,
        gpu=gpu,
        llm=llm,
        model=model,
        tp=tp,
        ep=ep,
        idle=idle,
        total_timesteps=steps,
        seed=seed,
    )
    base = validate(base.model_dump() | given, AgentConfig, "train")
    instance_hardware(base.instance)  # a wrong name is said before a directory is made
    named = f"train-{datetime.now():%Y%m%d-%H%M%S}-{phase}-{base.algo}"
    folder = out or new_folder(Path("runs") / named)
    for k in range(seeds):
        mine = base.model_copy(update={"seed": base.seed + k})
        _train_one(mine, folder if seeds == 1 else folder / f"seed-{mine.seed}", resume)


def _train_one(config: "AgentConfig", folder: Path, resume: bool) -> None:
    from agents.training.run import CONFIG, claimed, set_up
    from agents.training.run import train as learn

    with claimed(folder):
        run = set_up(config, folder, resume and (folder / CONFIG).is_file())
        print(
            f"{config.phase}, {config.algo}, seed {config.seed}: {config.total_timesteps} steps, "
            f"{config.n_envs} sub-environments, directory {folder}"
        )
        metrics = learn(run, print, progress=sys.stderr.isatty())
    print(f"{'held-out workloads':36s} {'energy ratio':>12s} {'attainment':>11s} {'target':>8s}")
    for name, e, a, t in zip(
        run.evaluate.names,
        metrics.energy_ratio,
        metrics.attainment,
        run.evaluate.targets,
        strict=True,
    ):
        print(f"{name:36s} {e:12.4f} {a:11.3%} {t:8.2%}{'' if a >= t else '   missed'}")
    print(f"best policy: {folder / ('best.zip' if config.algo == 'recurrent_ppo' else 'best.npz')}")


def tune(
    phase: Annotated[str, typer.Argument(help="prefill or decode")],
    algo: Annotated[
        str | None, typer.Option(help="ppo, sac, tqc, dqn or recurrent_ppo. [default: ppo]")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Config to start from; default: the shipped one.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Trials in this session.")] = 20,
    steps: Annotated[int, typer.Option(help="Env steps per trial.")] = 300_000,
    out: Annotated[
        Path, typer.Option(help="Directory; the study in it is stored and resumed.")
    ] = Path("runs/tune"),
) -> None:
    """Search hyper-parameters with Optuna.

    The study is stored in <out>/study.db and the best config beside it.
    """
    _need_rl()
    from agents.training.study import run_study
    from agents.training.train_config import load_config

    if trials < 1 or steps < 1:
        raise BiscaleError("--trials and --steps must be at least 1")
    best, path = run_study(load_config(config, phase, algo), trials, steps, out)
    print(f"best score {best:.4f}; config: {path}")
