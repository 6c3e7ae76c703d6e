"""Several training seeds of one config, over processes or machines; every seed in its folder."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agents.training.export import BEST
from agents.training.heldout import HeldoutMetrics
from agents.training.run import BEST_ZIP, CONFIG, claimed, open_folder, set_up, train
from agents.training.train_config import AgentConfig
from biscale_env.jobs.workers import Workers, run_each

Said = Callable[[str], None]


def train_seed(
    config: AgentConfig,
    folder: Path,
    resume: bool,
    say: Said | None = None,
    progress: bool = False,
) -> str:
    """Train one seed to its end; what came of it, as a table.

    Args:
        config: of this seed.
        folder: its directory.
        resume: go on with a run that is there.
        say: called with each line of progress; None: silent.
        progress: show a bar.

    Raises:
        BiscaleError: there is a run that may not be resumed, or training breaks.
    """
    with claimed(folder):
        run = set_up(config, folder, resume and (folder / CONFIG).is_file())
        if say is not None:
            say(
                f"{config.phase}, {config.algo}, seed {config.seed}: {config.total_timesteps} "
                f"steps, {config.n_envs} sub-environments, directory {folder}"
            )
        metrics = train(run, say or (lambda text: None), progress=progress)
    lines = [f"{'held-out workloads':36s} {'energy ratio':>12s} {'attainment':>11s} {'target':>8s}"]
    lines += _rows(run.evaluate.names, metrics, run.evaluate.targets)
    best = BEST_ZIP if config.algo == "recurrent_ppo" else BEST
    return "\n".join([*lines, f"best policy: {folder / best}"])


def _rows(names: list[str], metrics: HeldoutMetrics, targets: NDArray[np.float64]) -> list[str]:
    return [
        f"{name:36s} {e:12.4f} {a:11.3%} {t:8.2%}{'' if a >= t else '   missed'}"
        for name, e, a, t in zip(
            names, metrics.energy_ratio, metrics.attainment, targets, strict=True
        )
    ]


def train_seeds(
    configs: list[AgentConfig], folder: Path, resume: bool, workers: Workers, say: Said
) -> None:
    """Train seeds side by side, each in ``folder/seed-N``.

    A seed whose worker is killed goes on from its last stored state. On a cluster the folder has
    to be one that every node sees.

    Args:
        configs: one per seed.
        folder: parent of their directories.
        resume: go on with runs that are there.
        workers: where.
        say: called with what came of each seed.

    Raises:
        BiscaleError: there is a run that may not be resumed, or training breaks.
    """
    folders = [(folder / f"seed-{config.seed}").absolute() for config in configs]
    for config, mine in zip(configs, folders, strict=True):
        # refused before anything is begun; from here on a run that is there is one of ours
        open_folder(mine, config, resume and (mine / CONFIG).is_file())
    calls = [(config, mine, True) for config, mine in zip(configs, folders, strict=True)]
    with closing(run_each(train_seed, calls, workers)) as results:
        for done, (number, text) in enumerate(results, start=1):
            say(f"seed {configs[number].seed} ({done} of {len(calls)} finished)\n{text}")
