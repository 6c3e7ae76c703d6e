"""Configuration of parameter-shared training in the cluster: ``configs/agents/multi*.yaml``."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from agents.training.algorithms import check_hyper
from agents.training.train_config import AgentConfig, load_config
from biscale_env.config.cluster_layout import Placement, load_placement
from biscale_env.config.loader import Config, load_named, load_yaml, validate
from biscale_env.envs.cluster.parallel_env import ClusterParallelEnv

PHASES = ("prefill", "decode")


class ClusterScenario(Config):
    """A cluster and its workload.

    Attributes:
        name: short name used in tables.
        placement: name of a disaggregated placement, or a YAML file.
        profile: generator profile.
        loads: fractions of what the placement is predicted to serve within the SLO at its clocks.
        env: further options of the many-agent environment: SLO, hardware, routing, ...
    """

    name: str
    placement: str = "default-16"
    profile: str = "gamma-sharegpt-like"
    loads: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.75,), min_length=1)
    env: dict[str, Any] = Field(default_factory=dict)

    def layout(self) -> Placement:
        """The placement."""
        return load_placement(self.placement)

    def make_env(self, interval_s: float, episode_s: float, **options: Any) -> ClusterParallelEnv:
        """The environment.

        Raises:
            BiscaleError: an unknown option or an impossible value.
        """
        given = {"profile": self.profile, **self.env, **options}
        return ClusterParallelEnv(self.layout(), interval_s, episode_s, **given)

    def goodput_rps(self) -> float:
        """Load that the placement is predicted to serve within the SLO, requests/s; measured."""
        return self.make_env(1.0, 60.0, load=1.0).options.source.rate_rps


class MultiConfig(Config):
    """A training run.

    Attributes:
        phase: always ``multi``.
        scenarios: clusters and workloads; every load of each is played by ``copies`` clusters.
        copies: clusters per scenario and load.
        interval_s: time between decisions of all agents, s.
        episode_s: length of an episode, s.
        n_workloads: how many different workloads the episodes of a cluster are drawn from.
        rounds: in a round one phase learns for an episode of every cluster while the other holds
            still, then the other way round.
        critic_rounds: first rounds in which only the critic learns.
        team: part of an agent's reward that is the mean over its phase in its cluster; 0: its own.
        start: checkpoint per phase to start from, ``shipped`` or a path; without one: from nothing.
        agents: per phase what differs from PPO's config of a single instance
            (:class:`agents.training.train_config.AgentConfig`).
        seed: of everything.
        evidence: where the values come from.
    """

    phase: Annotated[str, Field(pattern="^multi$")] = "multi"
    scenarios: tuple[ClusterScenario, ...] = Field(min_length=1)
    copies: int = Field(default=1, gt=0)
    interval_s: float = Field(default=0.1, gt=0)
    episode_s: float = Field(default=60.0, gt=0)
    n_workloads: int = Field(default=1000, gt=0)
    rounds: int = Field(default=40, gt=0)
    critic_rounds: int = Field(default=2, ge=0)
    team: float = Field(default=1.0, ge=0, le=1)
    start: dict[str, str] = Field(default_factory=dict)
    agents: dict[str, dict[str, Any]] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0)
    evidence: str = ""

    @model_validator(mode="after")
    def _phases_exist(self) -> "MultiConfig":
        for named in (self.start, self.agents):
            if set(named) - set(PHASES):
                raise ValueError(f"keys of start and agents are {' and '.join(PHASES)}")
        return self

    @property
    def steps(self) -> int:
        """Decisions of an agent in an episode."""
        return round(self.episode_s / self.interval_s)

    def agent(self, phase: str) -> AgentConfig:
        """What the network of a phase is made of and how it learns.

        Raises:
            BiscaleError: an unknown key or hyper-parameter.
        """
        base = load_config(None, phase).model_dump(mode="json")
        own = dict(self.agents.get(phase, {}))
        hyper = base["hyper"] | own.pop("hyper", {})
        changed = {**base, "anneal": False, **own, "hyper": hyper, "seed": self.seed}
        check_hyper(changed["algo"], hyper, f"agents of {phase}")
        return validate(changed, AgentConfig, f"agents: {phase}")


def load_multi_config(name: str | Path | None) -> MultiConfig:
    """Read a config by name or path; None: the shipped one.

    Raises:
        BiscaleError: no such config, an unknown key, or a value out of range.
    """
    path = Path(name or "multi")
    if path.suffix in (".yaml", ".yml"):
        return load_yaml(path, MultiConfig)
    return load_named("agents", str(path), MultiConfig)
