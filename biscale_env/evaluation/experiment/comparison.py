"""``biscale compare`` as a library: what is compared, where it is kept, what is resumed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from biscale_env.config.loader import validate
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.experiments import load_experiment
from biscale_env.evaluation.experiment.input_digests import inputs_of
from biscale_env.evaluation.experiment.policy_list import NamedPolicy, choose
from biscale_env.evaluation.experiment.run_comparison import conclude, prepare, run_all
from biscale_env.evaluation.rollouts.scenarios import Scenario, load_scenario
from biscale_env.evaluation.runs import run_files
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.jobs.workers import Workers
from biscale_env.policies.policy_source import PHASES
from biscale_env.traces import WindowSpacing

DEFAULT_SCENARIO: Final = "synthetic-default"
DEFAULT_LOAD: Final = 0.5
DEFAULT_SECONDS: Final = 600.0
QUICK_SECONDS: Final = 120.0
QUICK_TRACE_SECONDS: Final = 300.0
RUNS: Final = Path("runs")
FREE_IN_EXPERIMENTS: Final = frozenset(
    {"seeds", "load", "gpu", "llm", "model", "idle", "prefix_cache"}
)


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        name: name of the scenario or experiment; part of the run directory's name.
        points: operating points.
        phases: phases of each.
        policies: policies of each phase.
        tuned: choose free parameters on tuning workloads first.
        oracle_seeds: workloads per phase for which the optimum is computed; None for all.
        experiment: name of the frozen experiment; None for a single scenario.
        spread: ensemble members that every chosen setting is run in, for the range of its ratio.
    """

    name: str
    points: Sequence[Scenario]
    phases: Sequence[str]
    policies: Mapping[str, Sequence[NamedPolicy]]
    tuned: bool = False
    oracle_seeds: Mapping[str, int] | None = None
    experiment: str | None = None
    spread: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration that the run directory keeps."""
        return {
            "command": "compare",
            "experiment": self.experiment,
            "points": [point.model_dump() for point in self.points],
            "phases": list(self.phases),
            "policies": {
                phase: [list(policy) for policy in chosen]
                for phase, chosen in self.policies.items()
            },
            "tune": self.tuned,
            "spread_members": self.spread,
        }


def checked_phases(phase: str | None) -> tuple[str, ...]:
    """The phase that was asked for, or both.

    Raises:
        BiscaleError: neither prefill nor decode.
    """
    if phase is None:
        return PHASES
    if phase not in PHASES:
        raise BiscaleError(f"unknown phase '{phase}': choose prefill or decode")
    return (phase,)


def compare_scenario(
    scenario: str | None,
    changes: Mapping[str, Any],
    policies: Sequence[str] = (),
    phase: str | None = None,
    tune: bool = False,
    quick: bool = False,
) -> Comparison:
    """A comparison on one scenario.

    Args:
        scenario: name or file; None for the embedded generated workload.
        changes: keys of the scenario that are other here; None values do not count.
        policies: entries of :mod:`biscale_env.evaluation.experiment.policy_list`; none for all.
        phase: ``prefill``, ``decode``; None for both.
        tune: choose free parameters on tuning workloads first.
        quick: two minutes, one seed.

    Raises:
        BiscaleError: an unknown name or key, or an impossible value.
    """
    phases = checked_phases(phase)
    if scenario:
        base = load_scenario(scenario).model_dump()
    else:
        base = {
            "name": DEFAULT_SCENARIO,
            "load": DEFAULT_LOAD,
            "duration_s": DEFAULT_SECONDS,
        }
    given = {key: value for key, value in changes.items() if value is not None}
    if "trace" in given:
        base |= {"name": Path(given["trace"]).stem, "duration_s": None}
    if isinstance(given.get("windows"), str):  # its own message
        given["windows"] = WindowSpacing.of_text(given["windows"]).model_dump()
    if quick:
        base |= {"duration_s": QUICK_SECONDS, "seeds": 1}
    point = validate(base | given, Scenario, "compare")
    return Comparison(point.name, [point], phases, choose(policies, phases), tune)


def compare_experiment(
    name: str,
    changes: Mapping[str, Any],
    policies: Sequence[str] = (),
    phase: str | None = None,
    quick: bool = False,
) -> Comparison:
    """A comparison on all points of a frozen experiment.

    Args:
        name: name or YAML file.
        changes: keys that may be other here: seeds, load, gpu, llm, model, idle, prefix_cache.
        policies: entries instead of the experiment's; none for its own.
        phase: one of its phases only.
        quick: two minutes, one seed.

    Raises:
        BiscaleError: no such experiment, or another key is changed.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    if frozen_keys := set(given) - FREE_IN_EXPERIMENTS:
        key = max(frozen_keys).removesuffix("_s")  # "trace" before "reading", which goes with it
        what = "the options of reading a trace" if key == "reading" else f"--{key}"
        raise BiscaleError(f"--experiment is frozen: leave out {what}")
    named = ("gpu", "llm", "model", "prefix_cache")
    update: dict[str, Any] = {key: given[key] for key in named if key in given}
    if "idle" in given:
        update["idles"] = (given["idle"],)
    if phase is not None:
        update["phases"] = checked_phases(phase)
    if "seeds" in given or quick:
        update["seeds"] = 1 if quick else given["seeds"]
    if "load" in given:
        update["loads"] = (given["load"],)
    experiment = load_experiment(name).model_copy(update=update)
    points = experiment.scenarios()
    if quick:
        points = [point.model_copy(update=_quickly(point)) for point in points]
    return Comparison(
        experiment.name,
        points,
        experiment.phases,
        choose(policies or experiment.policies, experiment.phases),
        experiment.tune,
        experiment.oracle_seeds_by_phase,
        experiment.name,
        experiment.spread_members,
    )


def _quickly(point: Scenario) -> dict[str, float]:
    """Lengths for a first look; of a trace enough that a capacity can be searched in it."""
    seconds = QUICK_SECONDS if point.trace is None else QUICK_TRACE_SECONDS
    return {"duration_s": seconds, "decode_duration_s": seconds}


def run_comparison(
    comparison: Comparison,
    out: Path | None = None,
    resume: bool = False,
    n_jobs: int | Workers | None = None,
) -> Path:
    """Run a comparison and keep everything in its run directory; print table and report.

    Args:
        comparison: what to compare.
        out: run directory; None makes a new one under ``runs``, or takes the newest of this
            comparison there to resume.
        resume: go on with an interrupted run.
        n_jobs: processes, or which workers; None for all cores.

    Returns:
        The run directory.

    Raises:
        BiscaleError: nothing to resume, a directory of other settings, a point that cannot be run.
    """
    folder = out or (run_to_resume(comparison) if resume else new_folder(comparison.name))
    prepared = prepare(
        comparison.points,
        comparison.phases,
        comparison.policies,
        comparison.tuned,
        comparison.oracle_seeds,
        comparison.spread,
    )
    seeds = {"workloads": comparison.points[0].seeds}
    inputs = inputs_of(prepared.jobs)
    with RunDirectory(
        folder, comparison.config, resume=resume, inputs=inputs, seeds=seeds
    ) as directory:
        run_all(directory, prepared.jobs, n_jobs, prepared.infeasible)
    conclude(folder)
    return folder


def new_folder(name: str) -> Path:
    """A run directory of its own, named by the time."""
    return RUNS / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"


def run_to_resume(comparison: Comparison, runs: Path = RUNS) -> Path:
    """The run directory that an interrupted comparison is resumed in.

    What is inside the directories decides, not their names: among those of the same experiment (or
    scenario) the newest with the same settings, else the newest.

    Raises:
        BiscaleError: there is none.
    """
    found = [
        (_same_settings(config, comparison.config), time, folder)
        for folder, config, time in _finished_configs(runs)
        if _same_subject(config, comparison)
    ]
    if not found:
        raise BiscaleError(
            f"there is no run of {comparison.name} under {runs}/ to resume; "
            "give its folder with --out"
        )
    return max(found)[2]


def _finished_configs(runs: Path) -> list[tuple[Path, Mapping[str, Any], str]]:
    """Folder, configuration and time of the last session of every readable run directory."""
    found: list[tuple[Path, Mapping[str, Any], str]] = []
    for folder in sorted(runs.glob("*")):
        try:
            config = run_files.read_config(folder)
            time = str(run_files.read_provenance(folder).get("time_utc", ""))
        except (BiscaleError, OSError):  # damaged, or something else
            continue
        found.append((folder, config, time))
    return found


def _same_subject(config: Mapping[str, Any], comparison: Comparison) -> bool:
    points = config.get("points")
    if config.get("command") != "compare" or not isinstance(points, list):
        return False
    if comparison.experiment or config.get("experiment"):
        return config.get("experiment") == comparison.experiment
    return [point.get("name") for point in points] == [p.name for p in comparison.points]


def _same_settings(config: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    plain: dict[str, Any] = run_files.plain(asked)
    return {**config, "policies": None} == {**plain, "policies": None}
