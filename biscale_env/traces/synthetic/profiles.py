"""Profiles: what a generated workload is made of, from ``configs/traces`` or a YAML file.

``lengths-*.yaml`` describe prompt and output lengths, ``rates-*.yaml`` the shape of the request
rate over days, every other file a whole workload: arrivals, lengths, default rate and duration.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import Field, model_serializer, model_validator

from biscale_env.config import list_names, load_yaml
from biscale_env.config.loader import Config, configs_dir
from biscale_env.core.errors import BiscaleError
from biscale_env.traces.checks import MAX_TOKENS

FOLDER = "traces"
LENGTHS, RATES, DOWNLOADS = "lengths-", "rates-", "downloads"

C = TypeVar("C", bound=Config)


class Quantiles(Config):
    """A length distribution by its quantiles, linear in between.

    Attributes:
        kind: marks this form.
        levels: rising probabilities from 0 to 1.
        tokens: length at each level, tokens; not falling.
    """

    kind: Literal["quantiles"] = "quantiles"
    levels: tuple[float, ...] = Field(min_length=2)
    tokens: tuple[float, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _is_distribution(self) -> "Quantiles":
        levels, tokens = np.array(self.levels), np.array(self.tokens)
        if (
            levels.size != tokens.size
            or levels[0] != 0
            or levels[-1] != 1
            or (np.diff(levels) <= 0).any()
        ):
            raise ValueError("levels must rise from 0 to 1, one for each of tokens")
        if tokens[0] < 1 or tokens[-1] > MAX_TOKENS or (np.diff(tokens) < 0).any():
            raise ValueError("tokens must not fall and start at 1 or more")
        return self


class LogNormal(Config):
    """A log-normal length distribution, clipped to ``[1, max_tokens]``.

    Mean and CV are those before clipping.
    """

    kind: Literal["lognormal"]
    mean_tokens: float = Field(gt=0)
    cv: float = Field(gt=0)
    max_tokens: int = Field(gt=0, le=MAX_TOKENS)


Marginal = Annotated[Quantiles | LogNormal, Field(discriminator="kind")]


class LengthProfile(Config):
    """Prompt and output lengths and how they depend on each other.

    Attributes:
        name: short name.
        prompt_tokens: distribution of the prompt length.
        output_tokens: distribution of the output length.
        rank_correlation: Spearman correlation of the two; a Gaussian copula has it unless
            ``rank_grid`` is given.
        rank_grid: k x k fractions of the requests by rank of prompt (row) and output (column): a
            copula that also shows dependence which is not monotone.
        source: where the numbers come from.
    """

    name: str
    prompt_tokens: Marginal
    output_tokens: Marginal
    rank_correlation: float = Field(default=0.0, gt=-1, lt=1)
    rank_grid: tuple[tuple[float, ...], ...] | None = None
    source: str

    @model_validator(mode="after")
    def _grid_is_copula(self) -> "LengthProfile":
        if self.rank_grid is not None:
            k = len(self.rank_grid)
            if any(len(row) != k for row in self.rank_grid):
                raise ValueError("rank_grid must be square")
            grid = np.array(self.rank_grid)
            if (grid < 0).any() or max(abs(grid.sum(a) - 1 / k).max() for a in (0, 1)) > 0.02 / k:
                raise ValueError(
                    "each row and each column of rank_grid must sum to 1 / (number of rows)"
                )
        return self


class Modulation(Config):
    """Two-state Markov modulation of the rate.

    Exponential stays in a high and a low state, mean factor 1.

    Attributes:
        high_factor: rate in the high state relative to the mean.
        mean_high_s: mean stay in the high state, s.
        mean_low_s: mean stay in the low state, s.
    """

    high_factor: float = Field(ge=1)
    mean_high_s: float = Field(gt=0)
    mean_low_s: float = Field(gt=0)

    @property
    def high_share(self) -> float:
        """Fraction of time in the high state."""
        return self.mean_high_s / (self.mean_high_s + self.mean_low_s)

    @property
    def low_factor(self) -> float:
        """Rate in the low state relative to the mean: what is left for it."""
        return max(0.0, (1 - self.high_share * self.high_factor) / (1 - self.high_share))

    @model_validator(mode="after")
    def _low_rate_not_negative(self) -> "Modulation":
        if self.high_share * self.high_factor > 1 + 1e-9:
            raise ValueError(
                f"high_factor must not exceed 1 / high share = {1 / self.high_share:.4g}"
            )
        return self


class RateEnvelope(Config):
    """Shape of the request rate over one period, repeated for longer workloads.

    Attributes:
        name: short name.
        start: moment of the first factor.
        step_s: time between factors, s; the factor holds in the middle of its step, linear in
            between.
        factors: rate relative to the mean of the period.
        source: where the numbers come from.
    """

    name: str
    start: str = ""
    step_s: float = Field(gt=0)
    factors: tuple[Annotated[float, Field(ge=0)], ...] = Field(min_length=2)
    source: str

    @model_validator(mode="after")
    def _has_mean_one(self) -> "RateEnvelope":
        if abs(float(np.mean(self.factors)) - 1) > 0.01:
            raise ValueError("factors must have a mean of 1")
        return self

    @property
    def period_s(self) -> float:
        """Length of one period, s."""
        return self.step_s * len(self.factors)


class Arrivals(Config):
    """Arrival process: gamma gaps in operational time.

    Operational time runs as fast as modulation and envelope say.

    Attributes:
        gap_cv: coefficient of variation of the gaps at a constant rate; 1 is Poisson.
        modulation: two-state Markov modulation (MMPP when ``gap_cv`` is 1).
        envelope: name of a ``rates-`` profile, or None.
        start_s: moment of the envelope at which the workload starts, s.
    """

    gap_cv: float = Field(default=1.0, ge=0.05, le=20)
    modulation: Modulation | None = None
    envelope: str | None = None
    start_s: float = Field(default=0.0, ge=0)


class Sessions(Config):
    """How requests belong together, and what their prompts share.

    Attributes:
        repeated_share: share of sessions with more than one turn.
        turns_mean: mean turns of those, geometric from 2 on (that form is assumed).
        lengths: name of the ``lengths-`` profile of their first turns; outputs of later turns too.
        message_tokens: what a later turn adds.
        grows: a prompt is the chat so far (prompts, answers, the new message); without, it is
            another message behind the same document, which the first prompt held.
        think_mean_s: mean time from a turn to the next, s; gamma.
        think_cv: its coefficient of variation.
        system_prompts: different system prompts that sessions begin with; 0 for none.
        system_tokens: length of each, added to the lengths of the profiles.
        longest_tokens: a session whose chat is longer than this ends.
        block_tokens: tokens of a block.
    """

    repeated_share: float = Field(ge=0, le=1)
    turns_mean: float = Field(ge=2)
    lengths: str
    message_tokens: Marginal
    grows: bool
    think_mean_s: float = Field(gt=0)
    think_cv: float = Field(default=1.0, ge=0.05, le=20)
    system_prompts: int = Field(default=0, ge=0)
    system_tokens: int = Field(default=0, ge=0)
    longest_tokens: int = Field(default=131072, gt=0)
    block_tokens: int = Field(default=16, gt=0)


class ClassShare(Config):
    """Requests of one SLO class of a generated workload.

    Attributes:
        share: share of the requests; with sessions, of the sessions.
        lengths: name of the ``lengths-`` profile of their lengths; None: the workload's.
    """

    share: float = Field(gt=0, le=1)
    lengths: str | None = None


class WorkloadProfile(Config):
    """A workload that `generate` can make.

    Attributes:
        name: short name.
        rate_rps: default mean rate, requests/s.
        duration_s: default duration, s.
        seed: default seed.
        arrivals: arrival process.
        lengths: name of a ``lengths-`` profile; with sessions, of those with one turn.
        sessions: how requests belong together; None: every request stands for itself.
        classes: SLO classes of requests by name; what their shares leave are requests of none.
        measured: statistics of the trace that the profile was fitted to, for comparison; not used
            to generate.
        source: where the numbers come from.
    """

    name: str
    rate_rps: float = Field(gt=0)
    duration_s: float = Field(gt=0)
    seed: int = Field(default=0, ge=0)
    arrivals: Arrivals
    lengths: str
    sessions: Sessions | None = None
    classes: dict[str, ClassShare] = Field(default_factory=dict)
    measured: dict[str, float] = Field(default_factory=dict)
    source: str

    @model_validator(mode="after")
    def _classes_are_shares(self) -> "WorkloadProfile":
        if sum(one.share for one in self.classes.values()) > 1 + 1e-9:
            raise ValueError("shares of classes must not add up to more than 1")
        if self.sessions is not None and any(one.lengths for one in self.classes.values()):
            raise ValueError("sessions have the same lengths in every class: leave lengths out")
        return self

    @model_serializer(mode="wrap")
    def _without_empty(self, plain: Any) -> Any:
        """A profile without classes is written as it always was: digests depend on it."""
        found = plain(self)
        if not self.classes:
            found.pop("classes", None)
        return found


def profile_names(prefix: str = "") -> list[str]:
    """Names of the shipped profiles.

    Of lengths (``lengths-``), of rates (``rates-``), or of workloads (no prefix).
    """
    names = list_names(FOLDER)
    if prefix:
        return [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
    return [n for n in names if not n.startswith((LENGTHS, RATES)) and n != DOWNLOADS]


def _load(prefix: str, what: str, name: str, model: type[C]) -> C:
    as_file = Path(name)
    if as_file.suffix in {".yaml", ".yml"}:
        return load_yaml(as_file, model)
    if name not in profile_names(prefix):
        raise BiscaleError(
            f"unknown {what} profile '{name}'; known: {', '.join(profile_names(prefix))}"
        )
    return load_yaml(configs_dir() / FOLDER / f"{prefix}{name}.yaml", model)


def load_lengths(name: str) -> LengthProfile:
    """Load a length profile by name or YAML file."""
    return _load(LENGTHS, "length", name, LengthProfile)


def load_envelope(name: str) -> RateEnvelope:
    """Load a rate envelope by name or YAML file."""
    return _load(RATES, "rate", name, RateEnvelope)


def load_workload(name: str) -> WorkloadProfile:
    """Load a workload profile by name or YAML file."""
    return _load("", "workload", name, WorkloadProfile)
