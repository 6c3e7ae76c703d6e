"""Making workloads from profiles: deterministic in the seed, the global random state untouched."""

from dataclasses import replace

import numpy as np

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.synthetic.arrival_times import sample_arrivals
from biscale_env.traces.synthetic.lengths import sample_lengths
from biscale_env.traces.synthetic.profiles import (
    LengthProfile,
    WorkloadProfile,
    load_lengths,
    load_workload,
)
from biscale_env.traces.trace import Trace


def _seed_sequences(seed: int, count: int) -> list[np.random.Generator]:
    if seed < 0:
        raise BiscaleError(f"a seed must be a whole number of at least 0, got {seed}")
    return [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(count)]


def generate(
    profile: WorkloadProfile | str,
    rate_rps: float | None = None,
    duration_s: float | None = None,
    seed: int | None = None,
    lengths: LengthProfile | None = None,
) -> Trace:
    """Make a workload.

    Arrivals and lengths have random streams of their own, so a change of one leaves the draws of
    the other.

    Args:
        profile: workload profile, or its name or YAML file.
        rate_rps: mean rate, requests/s; default the profile's. The realised rate varies around it
            as the process does.
        duration_s: duration, s; default the profile's.
        seed: root seed; default the profile's.
        lengths: length profile in place of the one that the workload names.

    Raises:
        BiscaleError: unknown profile, or a rate or duration that is not positive.
    """
    profile = load_workload(profile) if isinstance(profile, str) else profile
    rate_rps = profile.rate_rps if rate_rps is None else rate_rps
    duration_s = profile.duration_s if duration_s is None else duration_s
    seed = profile.seed if seed is None else seed
    arrival_rng, length_rng = _seed_sequences(seed, 2)
    arrival_s = sample_arrivals(profile.arrivals, rate_rps, duration_s, arrival_rng)
    prompt, output = sample_lengths(
        lengths or load_lengths(profile.lengths), arrival_s.size, length_rng
    )
    source = f"generated: {profile.name}, {rate_rps:g} requests/s for {duration_s:g} s, seed {seed}"
    return Trace(profile.name, arrival_s, prompt, output, source, duration_s=duration_s)


def with_lengths(trace: Trace, lengths: LengthProfile | str, seed: int) -> Trace:
    """The arrivals of a trace with lengths drawn from a profile (as in BiScale's workload B: Azure
    with ShareGPT).

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
        trace, name=name, prompt_tokens=prompt, output_tokens=output, source=source, first_line=0
    )
