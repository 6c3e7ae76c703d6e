"""Regenerate what docs/ states, between its markers, and the pictures of the README.

Every block comes from the command that measures it.

Usage: python docs/update.py [models] [bench] [bench-cluster] [observation] [envs] [readme]
       [controllers]
       [compare=RUN_DIRECTORY] [experiment:NAME=RUN_DIRECTORY ...] [agents=EVALUATION,EVALUATION]
       [curves:PHASE=TRAINING_DIRECTORY] [curves:prefill-ppo=TRAINING_DIRECTORY]
       [algorithms=DIRECTORY_OF_RUNS] [algorithms-at-length=RUNS]
       [foresight-teacher=TRAINING_DIRECTORY] [policy-iteration=TRAINING_DIRECTORY]
       [robustness=EVALUATION]
       [leaderboard] [plans] [look-ahead] [paper=FOLDER_OF_A_REPRODUCTION]
       [plain-sb3=ROWS_OF_DOCS_PLAIN_SB3] [offline=RUN,RUN] [many-agents=FOLDER]
`make docs` runs the parts that need no long experiment.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import agent_tables
import controller_pages
import environment_pages
import experiment_pages
import foresight_figure
import look_ahead
import model_figures
import offline_tables
import pandas as pd
import plain_sb3
import readme_figures

from agents.training.progress.curves import draw, learning_curves
from biscale_env.contract import DECODE_SPEC, PREFILL_SPEC
from biscale_env.core.markdown import markdown_table
from biscale_env.evaluation.report.agent_table import markdown
from biscale_env.evaluation.report.robustness_table import robustness_markdown
from biscale_env.evaluation.report.tables import summary_markdown
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.suite.leaderboard import leaderboard_markdown
from biscale_env.evaluation.suite.score_card import read_card
from biscale_env.models.fit.report import frame_markdown, report_markdown, summary_frame
from biscale_env.policies.checkpoint_source import shipped_seeds
from controllers.oracle.shipped_plans import FILE, NO_PLANS, pack_plans

ROOT = Path(__file__).resolve().parent.parent
BISCALE = [sys.executable, "-m", "biscale_env.cli"]


def replace_block(path: Path, name: str, text: str) -> None:
    """Put text between ``<!-- begin:name -->`` and ``<!-- end:name -->``."""
    content = path.read_text()
    pattern = re.compile(
        rf"(<!-- begin:{re.escape(name)} -->\n).*?(<!-- end:{re.escape(name)} -->)", re.DOTALL
    )
    if not pattern.search(content):
        raise SystemExit(f"{path} has no block '{name}'")
    path.write_text(pattern.sub(lambda m: m.group(1) + text.strip() + "\n" + m.group(2), content))


def models() -> None:
    """The whole comparison into docs/models.md with its figures, the targets into evidence.md."""
    model_figures.draw(ROOT / "docs" / "models")
    head = (
        "# Model against measurement\n\nMade by `python docs/update.py models` from the committed"
        " coefficients (`biscale fit`) and the errors on what the fit is not shown (`biscale fit"
        " --held-out`). `biscale models describe NAME` lists the coefficients of one model with"
        " their sources.\n\n"
    )
    figures = "".join(
        f"![{text}](models/{name}.svg)\n\n" for name, text in model_figures.CAPTIONS.items()
    )
    (ROOT / "docs" / "models.md").write_text(head + figures + report_markdown())
    replace_block(
        ROOT / "docs" / "evidence.md",
        "models",
        frame_markdown(summary_frame()) + "\n\n![power by clock](models/kernels.svg)",
    )


def bench(target: str = "bench", page: str = "docs/speed.md", block: str = "bench") -> None:
    """Speed of this machine, as ``make bench`` left it in ``runs/``."""
    subprocess.run(["make", target], cwd=ROOT, check=True)
    measured = json.loads((ROOT / "runs" / f"{target}.json").read_text())["benchmarks"]
    figures = [metric for one in measured for metric in one["extra_info"].get("metrics", [])]
    rows = [
        (
            f["name"],
            f"{f['value']:,.3g} {f['unit']}",
            f"{'≤' if f['better'] == 'lower' else '≥'} {f['target']:,.3g}",
            f"{f['ratio']:.2f}",
        )
        for f in figures
    ]
    table = markdown_table(("what", "measured", "target", "ratio"), rows)
    replace_block(ROOT / page, block, table)


def bench_cluster() -> None:
    """Speed of the cluster and of tier 1, into docs/cluster.md."""
    bench("bench-cluster", "docs/cluster.md", "bench-cluster")


def observation() -> None:
    """The tables of both observation vectors."""
    text = (
        "# Observation\n\nMade by `python docs/update.py observation`. `encoded = clip(physical /"
        " scale, low, high)`, float32.\n"
    )
    for spec in (PREFILL_SPEC, DECODE_SPEC):
        text += f"\n## `{spec.id}` ({spec.dim} values)\n\n{spec.markdown()}\n"
    (ROOT / "docs" / "observation.md").write_text(text)


def envs() -> None:
    """A page per environment."""
    environment_pages.write(ROOT / "docs" / "environments")


def controllers() -> None:
    """A page per controller, with its burst."""
    controller_pages.write(ROOT / "docs" / "controllers")


def readme() -> None:
    """The two pictures of the README."""
    readme_figures.draw(ROOT / "docs")


def compare(folder: str) -> None:
    """The table of a plain `biscale compare`."""
    page = ROOT / "docs" / "start" / "first-run.md"
    replace_block(page, "compare", summary_markdown(load_run(folder).summary()))


def experiment(name: str, folder: str) -> None:
    """An experiment: whole tables and CSV into docs/, matrices of energy into docs/results.md.

    Of a run of one phase, that phase's.
    """
    run, table = load_run(folder), ROOT / "docs" / f"experiment-{name}.csv"
    experiment_pages.write_csv(table, run.summary())
    experiment_pages.write_page(table.with_suffix(".md"), name, run)
    if name == "foresight":
        foresight_figure.draw(table, ROOT / "docs" / "bounds" / "foresight.svg")
        replace_block(ROOT / "docs" / "bounds.md", "foresight", foresight_figure.markdown(table))
        return
    for block, text in experiment_pages.blocks(name, run).items():
        replace_block(ROOT / "docs" / "results.md", block, text)
    if name == "main":
        readme_figures.energy(table, ROOT / "docs" / "readme" / "energy.svg")


def agents(folders: str) -> None:
    """Tables of learned agents, from runs of `biscale evaluate`, a table per phase, into docs/."""
    for run in map(load_run, folders.split(",")):
        for phase, rows in run.results.groupby("phase", sort=False):
            text = markdown(rows, run.windows, shipped_seeds())
            replace_block(ROOT / "docs" / "agents-table.md", str(phase), text)


def curves(runs: str, folder: str) -> None:
    """Learning curves of all training seeds as ``curves-RUNS.csv``, and the shipped ones' figure.

    ``RUNS`` is the phase; ``prefill-ppo`` are those that others are compared with.
    """
    home = ROOT / "docs" / "agents"
    home.mkdir(exist_ok=True)
    learning_curves(Path(folder)).to_csv(home / f"curves-{runs}.csv", index=False)
    both = {p: home / f"curves-{p}.csv" for p in ("prefill", "decode")}
    draw({p: pd.read_csv(path) for p, path in both.items() if path.is_file()}, home / "curves.svg")


def training(block: str, table_of: Callable[[Path, Path], str], folder: str) -> None:
    """A table of training runs beside others, into docs/agents.md."""
    table = table_of(ROOT / "docs" / "agents", Path(folder))
    replace_block(ROOT / "docs" / "agents.md", block, table)


def algorithms(folder: str, block: str = "algorithms") -> None:
    """Training runs of all algorithms below a folder, each with its training seeds."""
    table = agent_tables.algorithms_markdown(Path(folder))
    replace_block(ROOT / "docs" / "agents.md", block, table)


def robustness(folder: str) -> None:
    """The shipped agents in distribution, shifted and on unseen workloads; a table per phase."""
    run = load_run(folder)
    for phase, rows in run.results.groupby("phase", sort=False):
        table = robustness_markdown(rows, run.windows)
        replace_block(ROOT / "docs" / "agents.md", f"robustness-{phase}", table)


def leaderboard() -> None:
    """The leaderboard from the committed score cards."""
    home = ROOT / "docs"
    cards = [read_card(path) for path in sorted((home / "leaderboard").glob("*.json"))]
    replace_block(home / "leaderboard.md", "leaderboard", leaderboard_markdown(cards))


def plans() -> None:
    """Plans of the oracle for the tasks of `core`, solved anew, as they are shipped (minutes)."""
    with tempfile.TemporaryDirectory() as name:
        settings = {**os.environ, "BISCALE_CACHE": name, NO_PLANS: "1"}
        command = [*BISCALE, "benchmark", "max", "--suite", "core", "--out", f"{name}/run"]
        subprocess.run(command, check=True, env=settings)
        pack_plans(Path(name).glob("oracle-plans/*/*.json"), FILE)


def offline(folders: str) -> None:
    """Data sets and held-out scores of ``biscale offline``, a phase per run, into its page."""
    page = ROOT / "docs" / "offline.md"
    for run in map(Path, folders.split(",")):
        phase = offline_tables.phase_of(run)
        replace_block(page, f"offline-data-{phase}", offline_tables.data_markdown(run))
        replace_block(page, f"offline-scores-{phase}", offline_tables.scores_markdown(run))


def paper(folder: str) -> None:
    """docs/paper.md and its figures from ``reproduce paper --out FOLDER``.

    What is explained by hand, between the markers of ``why``, stays.
    """
    page = ROOT / "docs" / "paper.md"
    kept = re.search(r"<!-- begin:why -->.*?<!-- end:why -->", page.read_text(), re.DOTALL)
    why = kept.group(0) if kept else "<!-- begin:why -->\n<!-- end:why -->"
    opening, heading, rest = (Path(folder) / "paper.md").read_text().partition("\n## ")
    page.write_text(f"{opening}\n{why}\n{heading}{rest}")
    for made in (Path(folder) / "paper").iterdir():
        if made.suffix in (".svg", ".csv"):
            shutil.copy(made, ROOT / "docs" / "paper" / made.name)


def many_agents(folder: str) -> None:
    """The table of `biscale reproduce multi --out FOLDER`, into docs/many-agents.md."""
    table = (Path(folder) / "multi.md").read_text()
    replace_block(ROOT / "docs" / "many-agents.md", "many-agents", table)


def look_ahead_table() -> None:
    """What looking ahead is worth under asynchronous scheduling, into docs/hardware.md."""
    replace_block(ROOT / "docs" / "hardware.md", "look-ahead", look_ahead.markdown())


def plain(rows_csv: str) -> None:
    """What plain Stable-Baselines3 learns: rows, figure, table of docs/train.md."""
    rows = pd.read_csv(rows_csv)
    kept = ROOT / "docs" / "agents" / "plain-sb3.csv"
    if Path(rows_csv).resolve() != kept:
        shutil.copy(rows_csv, kept)
    plain_sb3.draw(rows, ROOT / "docs" / "agents" / "plain-sb3.svg")
    replace_block(ROOT / "docs" / "train.md", "plain-sb3", plain_sb3.markdown(rows))


def main(arguments: list[str]) -> None:
    """Run the parts asked for; all but the long ones without arguments."""
    for argument in arguments or [
        "models",
        "observation",
        "envs",
        "controllers",
        "readme",
        "bench",
    ]:
        part, _, folder = argument.partition("=")
        if part.startswith("experiment:"):
            experiment(part.partition(":")[2], folder)
        elif part.startswith("curves:"):
            curves(part.partition(":")[2], folder)
        elif folder:
            {
                "compare": compare,
                "agents": agents,
                "algorithms": algorithms,
                "algorithms-at-length": partial(algorithms, block="algorithms-at-length"),
                "foresight-teacher": partial(training, "teachers", agent_tables.teachers),
                "policy-iteration": partial(
                    training, "policy-iteration", agent_tables.policy_iteration
                ),
                "robustness": robustness,
                "paper": paper,
                "plain-sb3": plain,
                "offline": offline,
                "many-agents": many_agents,
            }[part](folder)
        else:
            parts = {
                "models": models,
                "bench": bench,
                "bench-cluster": bench_cluster,
                "observation": observation,
                "envs": envs,
                "controllers": controllers,
                "readme": readme,
                "leaderboard": leaderboard,
                "plans": plans,
                "look-ahead": look_ahead_table,
            }
            parts[part]()


if __name__ == "__main__":
    main(sys.argv[1:])
