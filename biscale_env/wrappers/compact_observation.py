"""Twenty numbers of the observation that a small network does well with, scaled to about 1.

Of prefill's projected batches they keep the next one and the tightest deadline with the work before
it; counts are on a logarithmic scale.
"""

from typing import Any, Final

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from biscale_env.contract.observation import HORIZON
from biscale_env.envs.vector import PhaseVectorEnv
from biscale_env.wrappers.last_step import phase_env
from biscale_env.wrappers.observation_parts import (
    NamedObservation,
    NamedVectorObservation,
    ObservationPart,
    Seen,
)

MOST: Final = 20.0  # ends of the bounds; log(1 + x) of the greatest counts stays below
SLACKS: Final = 2.0  # bounds by which a deadline is early or late count alike from here on; assumed


def _log(name: str, scale: float, meaning: str) -> ObservationPart:
    return ObservationPart(
        name,
        f"log(1 + x / {scale:g}): {meaning}",
        lambda s: np.log1p(s.value(name) / scale),
        0,
        MOST,
    )


def _ratio(name: str, scale: float, meaning: str, most: float = MOST) -> ObservationPart:
    return ObservationPart(
        name, f"x / {scale:g}: {meaning}", lambda s: s.value(name) / scale, 0, most
    )


def _signed(name: str, meaning: str) -> ObservationPart:
    def value(seen: Seen) -> Any:
        x = seen.value(name)
        return np.sign(x) * np.log1p(np.abs(x))

    text = f"log(1 + |x|) with the sign of x: {meaning}, intervals"
    return ObservationPart(name, text, value, -MOST, MOST)


def _over_slo(name: str, meaning: str) -> ObservationPart:
    return ObservationPart(
        name, f"x / SLO: {meaning}", lambda s: s.value(name) / s.value("slo"), 0, MOST
    )


def _clock(name: str, meaning: str) -> ObservationPart:
    def value(seen: Seen) -> Any:
        clocks = seen.plant.clocks
        span = clocks.freq_max_mhz - clocks.freq_min_mhz
        return (seen.value(name) - clocks.freq_min_mhz) / span

    return ObservationPart(name, f"fraction of the control range: {meaning}", value, -1, 2)


_RATES: Final = (
    _log("arrival_rate_1s", 2.0, "requests/s over 1 s"),
    _log("arrival_rate_10s", 2.0, "requests/s over 10 s"),
    _log("arrival_rate_60s", 2.0, "requests/s over 60 s"),
    _log("token_rate_10s", 4000.0, "prompt tokens/s over 10 s"),
)
_CLOCK: Final = (
    _clock("freq_current", "clock in effect"),
    _clock("freq_pending", "clock asked for"),
    _over_slo("time_to_apply", "until that is in effect"),
    _over_slo("actuation_delay", "delay of a clock request"),
    _over_slo("last_time", "duration of the last iteration"),
)


def _tightest(seen: Seen) -> NDArray[np.int64]:
    """Number of the projected batch with the tightest deadline that can still be met, ``(...)``."""
    return np.asarray(seen.horizon("batch_slack_alive").argmin(axis=-1))


def _least_slack(seen: Seen) -> Any:
    return seen.horizon("batch_slack_alive").min(axis=-1)


def _work_until(name: str, scale: float) -> Any:
    def value(seen: Seen) -> Any:
        upto = np.arange(HORIZON) <= _tightest(seen)[..., None]
        return np.log1p((seen.horizon(name) * upto).sum(axis=-1) / scale)

    return value


PREFILL_PARTS: Final = (
    _ratio("batch_tokens", 2048.0, "tokens of the next batch"),
    _log("batch_requests", 4.0, "requests in it"),
    ObservationPart(
        "batch_slack",
        "its tightest deadline, SLOs",
        lambda s: s.value("batch_slack"),
        -SLACKS,
        SLACKS,
    ),
    ObservationPart(
        "least_slack", "tightest deadline not yet passed, SLOs", _least_slack, -SLACKS, SLACKS
    ),
    ObservationPart(
        "tokens_until",
        "log(1 + x / 2048): tokens up to and with that batch",
        _work_until("batch_tokens", 2048.0),
        0,
        MOST,
    ),
    ObservationPart(
        "attn_until",
        "log(1 + x / 2048^2): attention work up to and with it",
        _work_until("batch_attn", 2048.0**2),
        0,
        MOST,
    ),
    _log("queue_requests", 4.0, "waiting requests"),
    _log("queue_tokens", 2048.0, "waiting tokens"),
    _ratio("oldest_wait", 1.0, "age of the oldest request, SLOs"),
    *_RATES,
    *_CLOCK,
    _ratio("last_power", 700.0, "mean power per GPU of the last iteration, W"),
    _ratio("slo", 1.0, "bound of TTFT, s", 100.0),
)
DECODE_PARTS: Final = (
    _log("batch", 32.0, "running requests"),
    _log("cached_tokens", 1e5, "tokens in the KV cache"),
    _ratio("kv_use", 1.0, "fraction of the KV cache in use", 1.0),
    _log("recompute_tokens", 2048.0, "tokens to be recomputed"),
    _log("waiting_requests", 8.0, "waiting requests"),
    _log("waiting_tokens", 16384.0, "their tokens"),
    _log("oldest_wait", 1.0, "age of the oldest of them, s"),
    _signed("tpot_slack_min", "tightest slack"),
    _signed("tpot_slack_mean", "mean slack"),
    *_RATES,
    *_CLOCK,
    _ratio("last_power", 700.0, "mean power per GPU of the last iteration, W"),
    _ratio("slo", 0.1, "bound of TPOT, s", 100.0),
)


def compact_parts(phase: str) -> tuple[ObservationPart, ...]:
    """The twenty numbers of a phase."""
    return PREFILL_PARTS if phase == "prefill" else DECODE_PARTS


class CompactObservation(NamedObservation):
    """Twenty numbers instead of the documented vector."""

    def __init__(self, env: "gym.Env[Any, Any]", as_dict: bool = False) -> None:
        """Wrap an environment of one instance."""
        gym.utils.RecordConstructorArgs.__init__(self, as_dict=as_dict)
        plant = phase_env(env, "CompactObservation").plant
        super().__init__(env, compact_parts(plant.phase), as_dict)


class CompactVectorObservation(NamedVectorObservation):
    """The same for the native vector environment."""

    def __init__(self, env: PhaseVectorEnv, as_dict: bool = False) -> None:
        """Wrap a native vector environment."""
        super().__init__(env, compact_parts(env.unwrapped.plant.phase), as_dict)
