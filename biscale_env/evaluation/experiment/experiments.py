"""Frozen experiments: traces x loads x SLOs x delays x members.

Every controller is tuned on other data to the same attainment.
"""

import itertools
from typing import Literal

from pydantic import Field

from biscale_env.config.instance import IdleRule
from biscale_env.config.loader import Config, list_names, load_named
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Means
from biscale_env.evaluation.rollouts.scenarios import Scenario, load_scenario
from biscale_env.traces import WindowSpacing


class Experiment(Config):
    """A table of the project.

    Attributes:
        name: name of the YAML file.
        about: one sentence on what it answers.
        workloads: base scenarios (``configs/scenarios``), one per workload.
        phases: phases it runs.
        loads: fractions of capacity.
        slos: SLO names.
        gpu: GPU of every instance, name or YAML file; None takes the workload's.
        llm: LLM, likewise.
        model: fitted model, likewise.
        idles: what an instance without work draws, ``last-clock`` or ``parked``: every policy is
            tuned and judged under each; a null entry takes the workload's.
        prefix_cache: of prefill instances; None: that of the workloads.
        delays_s: actuation delays; a null entry takes that of the ensemble member.
        members: ensemble members.
        means: how clocks are held, ``lock`` or ``cap``: policies are tuned and judged under each.
        policies: entries ``[label=]name``, each in the syntax of :mod:`biscale_env.policies`;
            ``all`` for the default ones of the phase, ``ablations``, ``beliefs``.
        windows: cut the traces into windows of several days, such as ``30min/1d``; None takes the
            workload's own.
        tune: choose the free parameters of every policy on tuning workloads.
        folds: which half of a trace tunes, ``forward`` the first, ``backward`` the second; a
            generated workload has one fold only.
        seeds: workload seeds.
        spread_members: ensemble members that every chosen setting is run in, for the range of its
            energy ratio; 0 for none.
        oracle_seeds: workloads for which the optimum is computed, the first few; a number, or one
            per phase; None: all, so that every row of a table stands on the same workloads.
    """

    name: str
    about: str = ""
    workloads: tuple[str, ...] = Field(min_length=1)
    phases: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode")
    loads: tuple[float, ...] = (0.5, 0.75, 0.9)
    slos: tuple[str, ...] = ("biscale",)
    gpu: str | None = None
    llm: str | None = None
    model: str | None = None
    idles: tuple[IdleRule | None, ...] = Field(default=(None,), min_length=1)
    prefix_cache: str | None = None
    delays_s: tuple[float | None, ...] = (0.05,)
    members: tuple[int, ...] = (-1,)
    means: tuple[Means, ...] = Field(default=("lock",), min_length=1)
    policies: tuple[str, ...] = ("all",)
    windows: WindowSpacing | None = None
    tune: bool = True
    folds: tuple[Literal["forward", "backward"], ...] = Field(default=("forward",), min_length=1)
    seeds: int = Field(default=5, gt=0)
    spread_members: int = Field(default=0, ge=0)
    oracle_seeds: int | dict[Literal["prefill", "decode"], int] | None = None

    @property
    def oracle_seeds_by_phase(self) -> dict[str, int]:
        """Workloads of each phase for which the optimum is computed."""
        given = self.seeds if self.oracle_seeds is None else self.oracle_seeds
        return {
            phase: given if isinstance(given, int) else given.get(phase, 0) for phase in self.phases
        }

    def scenarios(self, traces: dict[str, str] | None = None) -> list[Scenario]:
        """All operating points; what varies besides load and SLO becomes part of its name.

        Args:
            traces: paths to use instead of named traces, by trace name.
        """
        made = []
        for base, idle, means, load, slo, delay, fold in itertools.product(
            self.workloads,
            self.idles,
            self.means,
            self.loads,
            self.slos,
            self.delays_s,
            self.folds,
        ):
            scenario = load_scenario(base)
            if scenario.trace is None and fold != self.folds[0]:
                continue
            path = (traces or {}).get(scenario.trace or "", scenario.trace)
            changes = {
                "name": self._name(base, delay, fold, idle, means),
                "workload": base,
                "trace": path,
                "load": load,
                "slo": slo,
                "delay_s": delay,
                "fold": fold,
                "means": means,
                "members": self.members,
                "seeds": self.seeds,
                **self._instance_changes(),
                **({} if idle is None else {"idle": idle}),
                **self._cut(scenario.trace),
            }
            made.append(scenario.changed(**changes))
        return made

    def _cut(self, trace: str | None) -> dict[str, WindowSpacing]:
        """Windows instead of a workload's own; a generated one has none."""
        return {} if self.windows is None or trace is None else {"windows": self.windows}

    def _name(
        self, base: str, delay_s: float | None, fold: str, idle: str | None, means: str
    ) -> str:
        """Name of a scenario in tables: its workload, and what varies besides."""
        words = [base]
        if len(self.delays_s) > 1:
            words.append(f"delay {'of the model' if delay_s is None else f'{1e3 * delay_s:g} ms'}")
        if fold == "backward":
            words.append("halves exchanged")
        if len(self.idles) > 1 and idle == "parked":
            words.append("parked")
        if len(self.means) > 1:
            words.append("clocks locked" if means == "lock" else "power capped")
        return ", ".join(words)

    def _instance_changes(self) -> dict[str, str]:
        given = {"gpu": self.gpu, "llm": self.llm, "model": self.model}
        given["prefix_cache"] = self.prefix_cache
        return {key: value for key, value in given.items() if value is not None}


def load_experiment(name: str) -> Experiment:
    """A frozen experiment ``configs/experiments/<name>.yaml`` or a YAML file.

    Raises:
        BiscaleError: no such experiment; lists the known ones.
    """
    if name not in list_names("experiments") and not name.endswith((".yaml", ".yml")):
        raise BiscaleError(
            f"unknown experiment '{name}'; known: {', '.join(list_names('experiments'))}"
        )
    return load_named("experiments", name, Experiment)
