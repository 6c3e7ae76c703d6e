"""Endless workloads, window by window: a day of millions of requests is never in memory at once."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces import Trace, generate, load_envelope, load_lengths, load_workload

DAY_S = 86_400.0


def envelope_factors(
    envelope: str, start_s: float, times_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Rate of an envelope (``configs/traces/rates-*.yaml``) relative to its mean over ``times_s``.

    Args:
        envelope: name of the envelope.
        start_s: time of day at which it begins, s.
        times_s: times from there, s.

    Raises:
        BiscaleError: it is zero at all of them.
    """
    shape = load_envelope(envelope)
    factors = np.array(shape.factors)
    position = np.mod(
        (start_s + times_s) / shape.step_s - 0.5, len(factors)
    )  # a factor holds in the middle of its step
    rate = np.interp(position, np.arange(len(factors) + 1), np.append(factors, factors[0]))
    if not rate.any():
        raise BiscaleError(f"rate profile '{envelope}' is zero from {start_s:g} s on")
    return rate / rate.mean()


def daily_windows(
    profile: str = "azure-conv-diurnal",
    rate_rps: float = 46.0,
    duration_s: float = DAY_S,
    window_s: float = 300.0,
    lengths: str | None = None,
    seed: int = 0,
) -> Iterator[Trace]:
    """Windows of a workload whose rate follows the profile's envelope.

    Within a window the rate is constant.

    Window k is the same whatever came before, and only one exists at a time.

    Args:
        profile: workload profile with an envelope.
        rate_rps: mean rate over the whole time.
        duration_s: how long.
        window_s: length of a window.
        lengths: length profile in place of the profile's own.
        seed: root of all windows.

    Raises:
        BiscaleError: a profile without an envelope, or less than a window.
    """
    workload = load_workload(profile)
    arrivals = workload.arrivals
    if arrivals.envelope is None:
        raise BiscaleError(
            f"workload '{profile}' has no envelope: choose one whose rate changes over the day"
        )
    if not 0 < window_s <= duration_s:
        raise BiscaleError(
            f"{duration_s:g} s are shorter than one window of {window_s:g} s: ask for more hours"
        )
    count = round(duration_s / window_s)
    rates = rate_rps * envelope_factors(
        arrivals.envelope,
        arrivals.start_s,
        np.asarray((np.arange(count) + 0.5) * window_s, dtype=np.float64),
    )
    flat = workload.model_copy(update={"arrivals": arrivals.model_copy(update={"envelope": None})})
    chosen = load_lengths(lengths) if lengths is not None else None
    for k, rate in enumerate(rates):
        child = int(np.random.SeedSequence([seed, k]).generate_state(1)[0])
        yield generate(
            flat, rate_rps=max(float(rate), 1e-9), duration_s=window_s, seed=child, lengths=chosen
        )
