"""Mutation testing with cosmic-ray: which changes of the code does no test notice?

Usage: ``python tests/mutation/mutate.py NAME [--sample 60] [--seed 0] [--baseline]`` with NAME a
    row of
``TARGETS``; ``make mutation`` runs every row. A seeded sample of all mutants is tried in a clone of
the committed sources, so the checkout stays as it is. Survivors are printed as diffs; a survivor is
an equivalent mutant or a missing test. Kernels run as plain Python (``NUMBA_DISABLE_JIT=1``): a
mutant would otherwise cost a compilation.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import WorkerOutcome, WorkResult

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Target:
    """What is mutated and which tests have to notice it.

    Attributes:
        paths: modules or packages.
        tests: arguments for pytest.
        interpreted: run kernels as plain Python.
    """

    paths: tuple[str, ...]
    tests: tuple[str, ...]
    interpreted: bool = False


TARGETS = {
    "sim": Target(
        ("biscale_env/sim/clock.py", "biscale_env/sim/prefill.py", "biscale_env/sim/decode.py"),
        ("tests/sim/test_sim_closed_forms.py", "tests/sim/test_sim_golden.py"),
        interpreted=True,
    ),
    "models": Target(
        ("biscale_env/models/physics.py", "biscale_env/models/iteration_model.py"),
        ("tests/models/test_models_physics.py", "tests/models/test_models_load.py"),
        interpreted=True,
    ),
    "envs": Target(
        (
            "biscale_env/envs/observe.py",
            "biscale_env/envs/options.py",
            "biscale_env/envs/vector.py",
        ),
        (
            "tests/envs/test_envs_single.py",
            "tests/envs/test_envs_vector.py",
            "tests/envs/test_envs_options.py",
        ),
    ),
    "stats": Target(("biscale_env/evaluation/stats",), ("tests/evaluation",)),
    "runs": Target(("biscale_env/evaluation/runs",), ("tests/evaluation",)),
    "loop": Target(
        (
            "biscale_env/hardware/loop/actuator.py",
            "biscale_env/hardware/loop/actuator_process.py",
            "biscale_env/hardware/loop/control.py",
            "biscale_env/hardware/loop/clockview.py",
        ),
        ("tests/hardware/test_hardware_actuator.py", "tests/hardware/test_hardware_control.py"),
    ),
}


def configuration(target: Target, seconds: float) -> str:
    """Configuration of cosmic-ray."""
    tests = " ".join(target.tests)
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider -m 'not slow' {tests}"
    lines = [
        "[cosmic-ray]",
        f"module-path = {json.dumps(list(target.paths))}",
        f"timeout = {seconds}",
        "excluded-modules = []",
        f"test-command = {json.dumps(command)}",
        "[cosmic-ray.distributor]",
        'name = "local"',
    ]
    return "\n".join(lines) + "\n"


def keep_sample(session: Path, count: int, seed: int) -> int:
    """Mark all mutants but a random sample as skipped; returns how many there were."""
    with use_db(session, WorkDB.Mode.open) as db:
        jobs = sorted(item.job_id for item in db.work_items)
        chosen = set(random.Random(seed).sample(jobs, min(count, len(jobs))))
        for job in jobs:
            if job not in chosen:
                db.set_result(job, WorkResult(WorkerOutcome.SKIPPED))
    return len(jobs)


def outcome(session: Path) -> tuple[int, list[str]]:
    """Mutants tried, and the diffs of those that no test noticed."""
    with use_db(session, WorkDB.Mode.open) as db:
        tried = [
            (item, r)
            for item, r in db.completed_work_items
            if r.worker_outcome != WorkerOutcome.SKIPPED
        ]
    survivors = [str(r.diff) for _, r in tried if not r.is_killed]
    return len(tried), survivors


def run(name: str, count: int, seed: int, seconds: float) -> None:
    """Try a sample of the mutants of one target and print what survived."""
    target = TARGETS[name]
    environment = os.environ | ({"NUMBA_DISABLE_JIT": "1"} if target.interpreted else {})
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "project"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        environment |= {"PYTHONPATH": str(clone)}
        (clone / "cr.toml").write_text(configuration(target, seconds))

        def cosmic(*arguments: str) -> None:
            command = [sys.executable, "-m", "cosmic_ray.cli", *arguments]
            subprocess.run(command, cwd=clone, env=environment, check=True)

        cosmic("init", "cr.toml", "session.sqlite")
        cosmic("baseline", "cr.toml")
        total = keep_sample(clone / "session.sqlite", count, seed)
        cosmic("exec", "cr.toml", "session.sqlite")
        tried, survivors = outcome(clone / "session.sqlite")
    print(f"{name}: {tried} of {total} mutants tried, {tried - len(survivors)} noticed")
    for diff in survivors:
        print(f"\n--- survivor of {name}\n{diff}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=list(TARGETS), help="default: all")
    parser.add_argument("--sample", type=int, default=60, help="mutants per target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="a mutant that takes longer counts as noticed"
    )
    options = parser.parse_args()
    for name in options.names or TARGETS:
        run(name, options.sample, options.seed, options.seconds)


if __name__ == "__main__":
    main()
