"""What an offline run is made of, as one validated object: ``configs/offline/*.yaml``."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from agents.training.train_config import AgentConfig, EvaluationConfig, Part, load_config
from biscale_env.config.loader import Config, load_named, load_yaml
from biscale_env.core.errors import BiscaleError

MIXED = "mixed"  # every quality together


class Learner(Config):
    """How one network is learned.

    Attributes:
        kind: ``bc``: behaviour cloning; ``td3bc``: TD3+BC (Fujimoto and Gu, 2021); ``iql``:
            implicit Q-learning (Kostrikov and others, 2021).
        updates: gradient steps.
        batch_size: transitions per step.
        learning_rate: of Adam.
        gamma: discount per decision.
        tau: share of the new weights that target networks take in per update.
        alpha: td3bc: weight of the critic against cloning.
        expectile: iql: which expectile of the action values the state value is.
        temperature: iql: how sharply better actions are preferred.
        price: range of the SLO-violation penalty that rewards are made for and the network is
            told, in mean energies of a request at max clock; None (bc): it sees no reward.
        margins: margins among which tuning chooses, see ``AgentConfig``.
    """

    kind: Literal["bc", "td3bc", "iql"]
    updates: int = Field(default=10_000, gt=0)
    batch_size: int = Field(default=512, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    gamma: float = Field(default=0.95, ge=0, lt=1)
    tau: float = Field(default=0.005, gt=0, le=1)
    alpha: float = Field(default=2.5, ge=0)
    expectile: float = Field(default=0.7, gt=0, lt=1)
    temperature: float = Field(default=3.0, gt=0)
    price: tuple[float, float] | None = None
    margins: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _price_for_who_sees_rewards(self) -> "Learner":
        if (self.price is None) != (self.kind == "bc"):
            raise ValueError("give a price to td3bc and iql, and none to bc, which sees no reward")
        return self


class OfflineConfig(Config):
    """An offline run.

    Attributes:
        phase: ``prefill`` or ``decode``.
        base: agent config that gives the workloads, the network and how often is decided; None:
            the shipped one of the phase.
        parts: workload families instead of those of ``base`` that need no trace.
        qualities: policies that are recorded, by the name of the data set that they take turns in.
        episodes: per quality and group (family at a load).
        episode_s: length of an episode, s.
        learners: by name; each is run on ``data``.
        data: qualities that networks are learned from, ``mixed`` for all together.
        evaluation: held-out workloads per group, and prices that are tried there.
        seed: of networks and batches.
        evidence: where the values come from.
    """

    phase: Literal["prefill", "decode"]
    base: str | None = None
    parts: tuple[Part, ...] = ()
    qualities: dict[str, tuple[str, ...]] = Field(min_length=1)
    episodes: int = Field(default=4, gt=0)
    episode_s: float = Field(default=120.0, gt=0)
    learners: dict[str, Learner] = Field(min_length=1)
    data: tuple[str, ...] = (MIXED,)
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = Field(default=0, ge=0)
    evidence: str = ""

    @model_validator(mode="after")
    def _known_data(self) -> "OfflineConfig":
        unknown = sorted(set(self.data) - {*self.qualities, MIXED})
        if unknown:
            raise ValueError(f"there is no data set '{unknown[0]}': it is none of the qualities")
        return self

    def qualities_of(self, data: str) -> tuple[str, ...]:
        """The qualities that a name in ``data`` means."""
        return tuple(self.qualities) if data == MIXED else (data,)

    def agent_config(self, learner: Learner | None = None) -> AgentConfig:
        """What the trainer's parts (groups, held-out evaluation) and checkpoints read.

        Args:
            learner: its price and margins; None for none.
        """
        base = load_config(self.base, self.phase)
        kept = self.parts or tuple(part for part in base.mixture if part.trace is None)
        own: dict[str, Any] = {
            "mixture": kept,
            "action": "clock",  # what is recorded
            "price": None if learner is None else learner.price,
            "margins": () if learner is None else learner.margins,
            "evaluation": self.evaluation,
            "warm_start": None,
            "evidence": self.evidence,
        }
        return base.model_copy(update=own)


def load_offline_config(name: str | Path | None, phase: str) -> OfflineConfig:
    """Read a config by name or path; None: the shipped one of the phase.

    Raises:
        BiscaleError: no such config, an unknown key, a value out of range, or the other phase.
    """
    path = Path(name or phase)
    if path.suffix in (".yaml", ".yml"):
        config = load_yaml(path, OfflineConfig)
    else:
        config = load_named("offline", str(path), OfflineConfig)
    if config.phase != phase:
        raise BiscaleError(f"config {path} is for {config.phase}, but {phase} was asked for")
    return config
