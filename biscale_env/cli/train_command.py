"""``biscale train`` and ``biscale tune``: learned agents on Stable-Baselines3."""

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from biscale_env.cli.comparison_options import RayAddress
from biscale_env.cli.instance_options import describes_instance
from biscale_env.cli.trace_options import told_on
from biscale_env.core.errors import BiscaleError
from biscale_env.core.extras import need_packages

Algorithm = Annotated[
    str | None,
    typer.Option(
        help="ppo, sac, tqc, dqn, recurrent_ppo or policy_iteration (prefill); default: ppo."
    ),
]
SeedsAtOnce = Annotated[
    int, typer.Option("--jobs", help="Seeds or trials that are trained at once, a process each.")
]


RL = {"torch": "torch", "stable_baselines3": "stable-baselines3", "tensorboard": "tensorboard"}
MARL = {"pettingzoo": "pettingzoo"}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("train")(train)
    app.command("tune")(tune)


@describes_instance("gpu", "llm", "model", "tp", "ep", "idle", "prefix_cache")
def train(
    phase: Annotated[
        str,
        typer.Argument(help="prefill, decode, cluster (the coarse loop) or multi (many agents)"),
    ],
    *,
    algo: Algorithm = None,
    config: Annotated[
        str | None,
        typer.Option(help="Config name or YAML file; default: that of phase and --algo."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Env steps instead of the config's.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="First training seed instead of the config's.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Train this many seeds.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Directory; default: runs/train-<time>-<phase>-<algo>.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out.")] = False,
    jobs: SeedsAtOnce = 1,
    ray: RayAddress = None,
    instance: dict[str, Any],
) -> None:
    """Train an agent.

    Every seed has a directory of its own with config, checkpoints, TensorBoard log and evaluations.
    Options of the instance say what is trained on: parts of the config's mixture of workloads that
    name another GPU, LLM, TP, EP or idle rule are left out.
    """
    need_packages("training needs", "rl", RL)
    if phase == "cluster":
        given = {"--algo": algo, "--steps": steps, "--seeds": None if seeds == 1 else seeds}
        _train_cluster(config, seed, out, resume, jobs, ray, given | instance)
        return
    if phase == "multi":
        given = {"--algo": algo, "--steps": steps, "--seeds": None if seeds == 1 else seeds}
        given |= {"--jobs": None if jobs == 1 else jobs, "--ray": ray}
        _train_multi(config, seed, out, resume, given | instance)
        return
    from agents.training.many_seeds import train_seed, train_seeds
    from agents.training.train_config import load_config
    from biscale_env.jobs.workers import Workers
    from biscale_env.models import instance_hardware

    workers = Workers.of(None if ray is not None and jobs == 1 else jobs, ray)
    if seeds < 1:
        raise BiscaleError(f"--seeds must be at least 1, got {seeds}")
    if seeds == 1 and (jobs > 1 or ray is not None):
        raise BiscaleError("--jobs and --ray train several seeds at once: give --seeds")
    check_resumable(resume, out)
    base = load_config(config, phase, algo)
    own = {"total_timesteps": steps, "seed": seed}
    given = instance | {key: value for key, value in own.items() if value is not None}
    base, left_out = base.changed(**given).trained_on(instance)
    instance_hardware(base.instance)  # a wrong name is said before a directory is made
    folder = run_folder(out, "train", f"{phase}-{base.algo}")
    with told_on(sys.stdout):
        if left_out:
            print(f"parts of the mixture on another instance, left out: {', '.join(left_out)}")
        configs = [base.model_copy(update={"seed": base.seed + k}) for k in range(seeds)]
        if seeds > 1 and not workers.alone:
            train_seeds(configs, folder, resume, workers, print)
            return
        for mine in configs:
            home = folder if seeds == 1 else folder / f"seed-{mine.seed}"
            print(train_seed(mine, home, resume, print, progress=sys.stderr.isatty()))


def check_resumable(resume: bool, out: Path | None) -> None:
    """Refuse to resume a run that is not named.

    Raises:
        BiscaleError: ``--resume`` without ``--out``.
    """
    if resume and out is None:
        raise BiscaleError("--resume needs the directory of the run: give it with --out")


def run_folder(out: Path | None, command: str, kind: str) -> Path:
    """The directory asked for, else a new one under ``runs/`` named by command, time and kind."""
    from agents.training.run_config import new_folder

    return out or new_folder(Path("runs") / f"{command}-{datetime.now():%Y%m%d-%H%M%S}-{kind}")


def _train_cluster(
    config: str | None,
    seed: int | None,
    out: Path | None,
    resume: bool,
    jobs: int,
    ray: str | None,
    others: dict[str, Any],
) -> None:
    """The coarse loop; what it is trained for stands in the config."""
    from agents.coarse.coarse_config import load_coarse_config
    from agents.coarse.coarse_run import train_coarse
    from biscale_env.jobs.workers import Workers

    _refuse("cluster", others)
    check_resumable(resume, out)
    mine = load_coarse_config(config)
    mine = mine if seed is None else mine.model_copy(update={"seed": seed})
    workers = Workers.of(None if ray is not None and jobs == 1 else jobs, ray)
    folder = run_folder(out, "train", "cluster")
    with told_on(sys.stdout):
        made = train_coarse(mine, folder, resume, workers, print)
    print(f"price {made.price:g}; agent: {folder / 'best.npz'}")


def _train_multi(
    config: str | None, seed: int | None, out: Path | None, resume: bool, others: dict[str, Any]
) -> None:
    """Agents of a cluster that share a network per phase."""
    need_packages("training many agents needs", "rl,marl", MARL)
    from agents.multi.multi_config import load_multi_config
    from agents.multi.multi_run import train_multi

    _refuse("multi", others)
    check_resumable(resume, out)
    mine = load_multi_config(config)
    mine = mine if seed is None else mine.model_copy(update={"seed": seed})
    folder = run_folder(out, "train", "multi")
    with told_on(sys.stdout):
        train_multi(mine, folder, resume, print)
    print(f"agents: {folder / 'prefill.npz'}, {folder / 'decode.npz'}")


def _refuse(phase: str, others: dict[str, Any]) -> None:
    """Refuse options that the config of a phase holds.

    Raises:
        BiscaleError: names the first one given.
    """
    given = sorted(name for name, value in others.items() if value is not None)
    if given:
        raise BiscaleError(
            f"biscale train {phase} takes no {given[0]}: write it into a copy of "
            f"configs/agents/{phase}.yaml and give that with --config"
        )


def tune(
    phase: Annotated[str, typer.Argument(help="prefill or decode")],
    algo: Algorithm = None,
    config: Annotated[
        str | None, typer.Option(help="Config to start from; default: that of phase and --algo.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Trials in this session.")] = 20,
    steps: Annotated[int, typer.Option(help="Env steps per trial.")] = 300_000,
    out: Annotated[
        Path, typer.Option(help="Directory; the study in it is stored and resumed.")
    ] = Path("runs/tune"),
    jobs: SeedsAtOnce = 1,
    ray: RayAddress = None,
) -> None:
    """Search hyper-parameters with Optuna.

    The study is stored in <out>/study.db, with --jobs or --ray in <out>/study.journal, and the
    best config beside it.
    """
    need_packages("the search needs", "rl", RL | {"optuna": "optuna"})
    from biscale_env.jobs.workers import Workers

    workers = Workers.of(None if ray is not None and jobs == 1 else jobs, ray)
    from agents.training.study import run_study
    from agents.training.train_config import load_config

    if trials < 1 or steps < 1:
        raise BiscaleError("--trials and --steps must be at least 1")
    best, path = run_study(load_config(config, phase, algo), trials, steps, out, workers)
    print(f"best score {best:.4f}; config: {path}")
