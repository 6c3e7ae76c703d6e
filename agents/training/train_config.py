"""What a training run is made of, as one validated object.

Shipped ones are ``configs/agents/*.yaml``.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from agents.training.algorithms import ALGORITHMS, check_hyper
from biscale_env.config import InstanceSpec, WithInstance
from biscale_env.config.hardware import Dtype
from biscale_env.config.instance import IdleRule
from biscale_env.config.loader import Config, load_named, load_yaml
from biscale_env.core.errors import BiscaleError

ONLY_PREFILL: Final = "policy_iteration is for prefill, not for {}: use ppo there"
PART_KEYS: Final = ("gpu", "llm", "tp", "ep", "dtype", "idle")  # of an instance, in a part


class Part(Config):
    """One family of workloads; every load of it is a group with a constraint of its own.

    Attributes:
        profile: generator profile, used without a trace.
        trace: name or path of a trace; only its first half is used, tables are made on the second.
        optional: pass over a trace that is not there instead of refusing.
        loads: fractions of the capacity of one instance at max clock.
        rates_rps: request rates instead of loads, for families that max clock cannot serve within
            the SLO at any load.
        slo: SLO of these episodes.
        gpu, llm, tp, ep, dtype, idle: of the instance in these episodes; None takes the config's
            (of a part with an LLM of its own: the number format that it is published in).
        workloads: different workloads per group.
        episode_s: length of an episode, s.
    """

    profile: str = "azure-conv-like"
    trace: str | None = None
    optional: bool = False
    loads: tuple[float, ...] = ()
    rates_rps: tuple[float, ...] = ()
    slo: str = "biscale"
    gpu: str | None = None
    llm: str | None = None
    tp: int | None = Field(default=None, gt=0)
    ep: int | None = Field(default=None, gt=0)
    dtype: Dtype | None = None
    idle: IdleRule | None = None
    workloads: int = Field(default=16, gt=0)
    episode_s: float = Field(default=240.0, gt=0)

    @model_validator(mode="after")
    def _some_load(self) -> "Part":
        if not self.loads and not self.rates_rps:
            raise ValueError("give loads or rates_rps")
        return self

    def instance_of(self, base: InstanceSpec) -> InstanceSpec:
        """The instance of these episodes, which differs from the config's in what is given here."""
        names = ("slo", *PART_KEYS)
        own = {name: value for name in names if (value := getattr(self, name)) is not None}
        return base.changed(**own)

    @property
    def label(self) -> str:
        """Where these episodes differ from others of the same workload, for the group's name."""
        parts = ["" if self.slo == "biscale" else self.slo, self.gpu, self.llm, self.dtype]
        parts += [f"{name}{n}" for name, n in (("tp", self.tp), ("ep", self.ep)) if n is not None]
        return "-".join(part for part in (*parts, self.idle) if part)


class Randomise(Config):
    """What changes from episode to episode besides the workload.

    Attributes:
        delay_s: range of the actuation delay; None takes that of the ensemble member.
        slo_scale: range of a factor on the SLO.
        nominal_share: fraction of episodes in the nominal plant; the others take a random member of
            the ensemble.
    """

    delay_s: tuple[float, float] | None = (0.0, 0.1)
    slo_scale: tuple[float, float] = (1.0, 1.0)
    nominal_share: float = Field(default=0.5, ge=0, le=1)


class Constraint(Config):
    """The Lagrangian: one multiplier per group, moved by plain SGD on (target - attainment).

    Attributes:
        reserve: attainment aimed at above the SLO's own (a quantile met exactly is missed half of
            the time).
        below_max: where max clock itself misses that target, the target is the attainment of max
            clock minus this.
        start: first multiplier: reward lost per violation, in units of the reference energy.
        rate: step of SGD, multiplier per unit of attainment.
        maximum: highest multiplier.
        memory: weight of the past in the measured attainment, per update.
    """

    reserve: float = 0.001
    below_max: float = Field(default=0.001, ge=0)
    start: float = Field(default=60.0, ge=0)
    rate: float = Field(default=1500.0, ge=0)
    maximum: float = Field(default=400.0, gt=0)
    memory: float = Field(default=0.8, ge=0, lt=1)


class WarmStart(Config):
    """Behaviour cloning before learning.

    Attributes:
        teacher: reference policy, e.g. ``mpc:margin=0.2,give_up=true,forecast=1,delay_aware=true``;
            in prefill also ``lookahead:seconds=0.5,price=12,reserve=0.2``, plans that know the next
            seconds (:mod:`agents.training.lookahead_teacher`).
        steps: env steps (all sub-environments together) per round.
        rounds: 1 is behaviour cloning; more is DAgger: later rounds run the student and ask the
            teacher.
        epochs: passes over the data after every round.
        learning_rate: of Adam.
        oracle_workloads: training workloads per group whose plan with hindsight is cloned too; the
            plan knows no delay, so it is data beside the teacher's, not a teacher (a student cannot
            ask it in states of its own).
    """

    teacher: str
    steps: int = Field(default=100_000, gt=0)
    rounds: int = Field(default=3, gt=0)
    epochs: int = Field(default=8, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    oracle_workloads: int = Field(default=0, ge=0)


class EvaluationConfig(Config):
    """Evaluation while training, on the held-out workloads (see :mod:`agents.training.heldout`).

    Attributes:
        every_steps: env steps between evaluations.
        workloads: held-out workloads per group.
        prices: penalties that are tried, spread over the config's range; every group counts at its
            best.
        patience: stop after this many evaluations without a better policy; 0 never stops early.
        goal: stop as soon as every group meets its attainment target and the mean energy ratio is
            at most this; None never does.
    """

    every_steps: int = Field(default=500_000, gt=0)
    workloads: int = Field(default=4, gt=0)
    prices: int = Field(default=6, gt=0)
    patience: int = Field(default=0, ge=0)
    goal: float | None = Field(default=None, gt=0)


class AgentConfig(WithInstance):
    """A training run.

    The instance's keys (``gpu``, ``model``, ``tp``, ``dtype``, ...) may be given beside its own.
    The SLO is that of each family of the mixture.

    Attributes:
        phase: ``prefill`` or ``decode``.
        algo: one of :data:`agents.training.algorithms.ALGORITHMS`.
        action: ``rule``: the network's output is added to the rule's clock (see
            ``agents.policy.features``); ``clock``: it is the clock; ``levels``: it is one of the
            GPU's clock levels (what DQN needs).
        span: fraction of the control range that the full output of the network spans with ``rule``.
        n_envs: sub-environments of the native vector environment.
        total_timesteps: env steps, all sub-environments together.
        net_arch: hidden layers.
        activation: ``tanh`` or ``relu``.
        log_std_init: logarithm of the first standard deviation of exploration (ppo,
            recurrent_ppo, policy_iteration).
        hyper: arguments of the SB3 algorithm.
        mixture: workload families.
        randomise: see :class:`Randomise`.
        constraint: see :class:`Constraint`.
        warm_start: see :class:`WarmStart`.
        evaluation: see :class:`EvaluationConfig`.
        price: range of the SLO-violation penalty (unit: the mean energy of a request at max clock
            in its group), sampled log-uniformly per episode and told to the network, instead of
            multipliers: one network then holds the whole trade-off, and the penalty is its free
            parameter, like the margin of MPC.
        margins: settings of the margin (fraction of the bound kept free, as in MPC; see
            :class:`agents.policy.feature_policy.FeaturePolicy`) among which evaluation and tuning
            choose; the network is not told (in prefill, train with a wide ``slo_scale``). Empty:
            the penalty is chosen.
        decision_interval_s: in training, a decision stands at least this long; 0 decides at every
            iteration.
        reward_scale: factor on the reward.
        anneal: let the learning rate fall linearly to 0 over the run.
        seed: seed of everything.
        device: torch device.
        evidence: where the hyper-parameters come from.
    """

    phase: Literal["prefill", "decode"]
    algo: str = "ppo"
    action: Literal["rule", "clock", "levels"] = "rule"
    span: float = Field(default=1.0, gt=0, le=2)
    n_envs: int = Field(default=128, gt=0)
    total_timesteps: int = Field(default=2_000_000, gt=0)
    net_arch: tuple[int, ...] = (64, 64)
    activation: Literal["tanh", "relu"] = "tanh"
    log_std_init: float = -1.5
    hyper: dict[str, Any] = Field(default_factory=dict)
    mixture: tuple[Part, ...] = Field(min_length=1)
    randomise: Randomise = Randomise()
    constraint: Constraint = Constraint()
    warm_start: WarmStart | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    price: tuple[float, float] | None = None
    margins: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    decision_interval_s: float = Field(default=0.0, ge=0)
    reward_scale: float = Field(default=0.2, gt=0)
    anneal: bool = False
    seed: int = Field(default=0, ge=0)
    device: str = "cpu"
    evidence: str = ""

    @model_validator(mode="after")
    def _slo_in_the_mixture(self) -> "AgentConfig":
        if "slo" in self.instance.model_fields_set and self.slo != InstanceSpec().slo:
            raise ValueError("give the SLO in the parts of the mixture")
        return self

    def trained_on(self, given: Mapping[str, Any]) -> tuple["AgentConfig", list[str]]:
        """Leave out the parts of the mixture that name another instance than the one asked for.

        Args:
            given: keys of the instance that the user chose; a part that names another value of one
                of ``gpu``, ``llm``, ``tp``, ``ep``, ``dtype``, ``idle`` is left out.

        Returns:
            The config with the other parts, and the labels of those left out.

        Raises:
            BiscaleError: no part is left.
        """
        asked = {key: given[key] for key in PART_KEYS if given.get(key) is not None}
        out = [
            part
            for part in self.mixture
            if any(getattr(part, key) not in (None, value) for key, value in asked.items())
        ]
        kept = tuple(part for part in self.mixture if part not in out)
        if not kept:
            words = ", ".join(f"{key} {value}" for key, value in asked.items())
            raise BiscaleError(
                f"every part of the mixture names another instance than {words}: change mixture in "
                "a copy of the config and give that with --config"
            )
        return self.model_copy(update={"mixture": kept}), [part.label for part in out]

    @property
    def actor_critic(self) -> bool:
        """Whether the networks are an actor with Gaussian actions and a critic."""
        return self.algo in ("ppo", "recurrent_ppo", "policy_iteration")

    @property
    def resumes_exactly(self) -> bool:
        """Whether all that the algorithm learns from is stored with a run.

        A resumed run then goes on bit for bit; others begin with an empty replay buffer.
        """
        return self.actor_critic

    @property
    def default_price(self) -> float:
        """SLO-violation penalty that the network is told unless another is asked for.

        The middle of the range, 0 where it takes none.
        """
        return math.sqrt(self.price[0] * self.price[1]) if self.price else 0.0


def load_config(name: str | Path | None, phase: str, algo: str | None = None) -> AgentConfig:
    """Read a config by name or path; without one, that of the phase and algorithm (PPO).

    Raises:
        BiscaleError: unknown algorithm, key or hyper-parameter, or a config of the other phase.
    """
    if algo is not None and algo not in ALGORITHMS:
        raise BiscaleError(f"unknown algorithm '{algo}'; known: {', '.join(ALGORITHMS)}")
    if algo == "policy_iteration" and phase != "prefill":
        raise BiscaleError(ONLY_PREFILL.format(phase))
    if name is None:
        name = f"{phase}-{(algo or 'ppo').replace('_', '-')}"
    path = Path(name)
    config = (
        load_yaml(path, AgentConfig)
        if path.suffix in (".yaml", ".yml")
        else load_named("agents", str(name), AgentConfig)
    )
    if config.phase != phase:
        raise BiscaleError(f"config {name} is for {config.phase}, but {phase} was asked for")
    if algo is not None and algo != config.algo:
        raise BiscaleError(
            f"config {name} is for {config.algo}, but --algo {algo} was given: leave one of them "
            "out"
        )
    check_hyper(config.algo, config.hyper, str(name))
    _check_policy_iteration(config, str(name))
    if (config.algo == "dqn") != (config.action == "levels"):
        raise BiscaleError(
            f"config {name}: action 'levels' and algorithm dqn belong together, got "
            f"{config.action} and {config.algo}"
        )
    return config


def _check_policy_iteration(config: AgentConfig, name: str) -> None:
    if config.algo != "policy_iteration":
        return
    if config.phase != "prefill":
        raise BiscaleError(f"config {name}: {ONLY_PREFILL.format(config.phase)}")
    if config.price is None:
        raise BiscaleError(
            f"config {name}: policy_iteration needs a range of penalties: give price: [low, high]"
        )
