"""Making workloads from profiles: deterministic in the seed, the global random state untouched."""

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import numpy as np

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.synthetic.arrival_times import sample_arrivals
from biscale_env.traces.synthetic.chats import SessionSampler
from biscale_env.traces.synthetic.class_shares import RequestClassShares
from biscale_env.traces.synthetic.lengths import LengthSampler, sample_lengths
from biscale_env.traces.synthetic.profiles import (
    LengthProfile,
    RateEnvelope,
    WorkloadProfile,
    load_envelope,
    load_lengths,
    load_workload,
)
from biscale_env.traces.trace import Trace


def _seed_sequences(seed: int, count: int) -> list[np.random.Generator]:
    if seed < 0:
        raise BiscaleError(f"a seed must be a whole number of at least 0, got {seed}")
    return [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(count)]


@dataclass(frozen=True)
class WorkloadRecipe:
    """A workload profile with all that it names loaded: makes any number of workloads.

    Attributes:
        profile: arrivals, default rate, duration and seed.
        lengths: prompt and output lengths.
        envelope: shape of the rate over days; None without one.
        several: lengths of sessions with several turns; None where requests stand for themselves.
        of_classes: lengths of SLO classes that have their own, by name.
    """

    profile: WorkloadProfile
    lengths: LengthProfile
    envelope: RateEnvelope | None
    several: LengthProfile | None = None
    of_classes: dict[str, LengthProfile] = field(default_factory=dict)

    @classmethod
    def of(cls, profile: WorkloadProfile | str, lengths: LengthProfile | None = None) -> Self:
        """Load what a profile names.

        Args:
            profile: workload profile, or its name or YAML file.
            lengths: length profile in place of the one that the workload names.

        Raises:
            BiscaleError: an unknown profile.
        """
        profile = load_workload(profile) if isinstance(profile, str) else profile
        named = profile.arrivals.envelope
        envelope = load_envelope(named) if named is not None else None
        # other lengths say nothing about sessions
        chats = profile.sessions if lengths is None else None
        several = load_lengths(chats.lengths) if chats is not None else None
        named_lengths = {
            name: load_lengths(one.lengths) for name, one in profile.classes.items() if one.lengths
        }
        own = lengths or load_lengths(profile.lengths)
        return cls(profile, own, envelope, several, {} if lengths is not None else named_lengths)

    @cached_property
    def sampler(self) -> LengthSampler:
        """The length profile, ready to be sampled."""
        return LengthSampler.of(self.lengths)

    @cached_property
    def digest(self) -> str:
        """Hash of everything that the workloads depend on but rate, duration and seed."""
        parts = (self.profile, self.lengths, self.envelope, self.several, *self.of_classes.values())
        told = "\n".join(part.model_dump_json() for part in parts if part is not None)
        return hashlib.sha256(told.encode()).hexdigest()

    def make(self, rate_rps: float, duration_s: float, seed: int) -> Trace:
        """Make a workload.

        Arrivals and lengths have random streams of their own, so a change of one leaves the samples
        of the other.

        Args:
            rate_rps: expected mean rate, requests/s; the realised one varies as the process does.
            duration_s: duration, s.
            seed: root seed.

        Raises:
            BiscaleError: a rate or duration that is not positive, or a negative seed.
        """
        name = self.profile.name
        arrival_rng, length_rng, class_rng = _seed_sequences(seed, 3)
        arrival_s = sample_arrivals(
            self.profile.arrivals, rate_rps, duration_s, arrival_rng, self.envelope
        )
        source = f"generated: {name}, {rate_rps:g} requests/s for {duration_s:g} s, seed {seed}"
        each = RequestClassShares.of(self.profile, class_rng)
        if self.several is not None and self.profile.sessions is not None:
            sampler = SessionSampler(self.profile.sessions, self.sampler, self.several)
            made = sampler.sample(arrival_s, length_rng)
            return Trace(
                name,
                arrival_s,
                made.prompt,
                made.output,
                source,
                duration_s=duration_s,
                blocks=made.blocks,
                classes=each.of_sessions(made.blocks),
            )
        prompt, output = self.sampler.sample(arrival_s.size, length_rng)
        classes = each.of_requests(arrival_s.size)
        if classes is not None:
            names = classes.each()
            for told, lengths in self.of_classes.items():
                mine = np.flatnonzero(names == told)
                prompt[mine], output[mine] = sample_lengths(lengths, mine.size, class_rng)
        return Trace(
            name, arrival_s, prompt, output, source, duration_s=duration_s, classes=classes
        )


def generate(
    profile: WorkloadProfile | str,
    rate_rps: float | None = None,
    duration_s: float | None = None,
    seed: int | None = None,
    lengths: LengthProfile | None = None,
) -> Trace:
    """Make one workload; see :class:`WorkloadRecipe` for many.

    Args:
        profile: workload profile, or its name or YAML file.
        rate_rps: mean rate, requests/s; default the profile's.
        duration_s: duration, s; default the profile's.
        seed: root seed; default the profile's.
        lengths: length profile in place of the one that the workload names.

    Raises:
        BiscaleError: unknown profile, or a rate or duration that is not positive.
    """
    recipe = WorkloadRecipe.of(profile, lengths)
    own = recipe.profile
    return recipe.make(
        own.rate_rps if rate_rps is None else rate_rps,
        own.duration_s if duration_s is None else duration_s,
        own.seed if seed is None else seed,
    )


def with_lengths(trace: Trace, lengths: LengthProfile | str, seed: int) -> Trace:
    """The arrivals of a trace with lengths sampled from a profile.

    As in BiScale's workload B: arrivals of Azure with lengths like ShareGPT. What the trace's own
    prompts share says nothing about them.

    Args:
        trace: where the arrival times come from.
        lengths: length profile, or its name or YAML file.
        seed: root seed of the lengths.
    """
    lengths = load_lengths(lengths) if isinstance(lengths, str) else lengths
    prompt, output = sample_lengths(lengths, len(trace), _seed_sequences(seed, 1)[0])
    source = f"{trace.source}; lengths {lengths.name}, seed {seed}"
    name = f"{trace.name}+{lengths.name}"
    return replace(
        trace,
        name=name,
        prompt_tokens=prompt,
        output_tokens=output,
        source=source,
        first_line=0,
        blocks=None,
    )
