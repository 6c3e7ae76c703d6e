"""The observation: a fixed-length float32 vector in fixed, documented scales, one per phase.

MPC, slack, rivals, learned agents and the hardware adapter all see exactly this vector. ``encoded =
clip(physical / scale, low, high)``. A checkpoint or recording names the spec and its version;
whoever loads it compares (see :meth:`ObservationSpec.check`).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.core.markdown import markdown_table

HORIZON = 8  # projected batches, K = 8 as in BiScale (arXiv 2602.18755)
NOW = "at the decision"
LAST = "last iteration"


@dataclass(frozen=True)
class Feature:
    """One index of the observation: ``encoded = clip(physical / scale, low, high)``."""

    name: str
    unit: str
    scale: float
    low: float
    high: float
    when: str
    meaning: str


@dataclass(frozen=True)
class ObservationSpec:
    """Names, units, scales and version of the observation of one phase."""

    name: str
    version: int
    features: tuple[Feature, ...]

    @property
    def id(self) -> str:
        """Name and version, e.g. ``prefill-v1``; stored with checkpoints and recordings."""
        return f"{self.name}-v{self.version}"

    @property
    def dim(self) -> int:
        """Length of the vector."""
        return len(self.features)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {f.name: i for i, f in enumerate(self.features)}

    def index(self, name: str) -> int:
        """Index of a feature; for a projected quantity, of its first batch.

        ``batch_tokens`` is ``batch_tokens_0``.
        """
        return self._index[name] if name in self._index else self._index[f"{name}_0"]

    @cached_property
    def scale(self) -> NDArray[np.float64]:
        """Physical units per encoded unit, ``(dim,)``."""
        return np.array([f.scale for f in self.features])

    @cached_property
    def low(self) -> NDArray[np.float32]:
        """Lower bounds of the encoded vector, ``(dim,)``."""
        return np.array([f.low for f in self.features], dtype=np.float32)

    @cached_property
    def high(self) -> NDArray[np.float32]:
        """Upper bounds of the encoded vector, ``(dim,)``."""
        return np.array([f.high for f in self.features], dtype=np.float32)

    def encode(self, physical: ArrayLike) -> NDArray[np.float32]:
        """Encode physical values, ``(..., dim)``."""
        scaled = np.asarray(physical, dtype=np.float64) / self.scale
        return np.clip(scaled, self.low, self.high).astype(np.float32)

    def value(self, observation: NDArray[np.float32], name: str) -> NDArray[np.float64]:
        """Physical value of one feature, ``(...)``, in the feature's unit."""
        i = self.index(name)
        return np.asarray(observation[..., i], dtype=np.float64) * self.scale[i]

    def horizon(self, observation: NDArray[np.float32], name: str) -> NDArray[np.float64]:
        """Physical values of a projected quantity, ``(..., HORIZON)``, in its unit."""
        i = self.index(f"{name}_0")
        return np.asarray(observation[..., i : i + HORIZON], dtype=np.float64) * self.scale[i]

    def check(self, other_id: str, where: str) -> None:
        """Refuse something made for another observation.

        Raises:
            BiscaleError: the ids differ; names both.
        """
        if other_id != self.id:
            raise BiscaleError(
                f"{where} was made for observation '{other_id}', "
                f"but this environment gives '{self.id}'"
            )

    def markdown(self) -> str:
        """Table of the whole vector for documentation."""
        head = ("index", "name", "unit", "scale", "low", "high", "when", "meaning")
        rows = [
            (
                i,
                f"`{f.name}`",
                f.unit,
                f"{f.scale:g}",
                f"{f.low:g}",
                f"{f.high:g}",
                f.when,
                f.meaning,
            )
            for i, f in enumerate(self.features)
        ]
        return markdown_table(head, rows, "l")


def _projected(
    name: str, unit: str, scale: float, low: float, high: float, meaning: str
) -> list[Feature]:
    return [
        Feature(f"{name}_{k}", unit, scale, low, high, NOW, f"batch {k}: {meaning}")
        for k in range(HORIZON)
    ]


_RATES = [
    Feature(
        f"arrival_rate_{w}s",
        "req/s",
        10.0,
        0.0,
        100.0,
        NOW,
        f"arrivals, exponential average over {w} s",
    )
    for w in (1, 10, 60)
] + [
    Feature(
        "token_rate_10s",
        "tokens/s",
        1e4,
        0.0,
        100.0,
        NOW,
        "prompt tokens arriving, exponential average over 10 s",
    )
]

_CLOCK = [
    Feature("freq_current", "MHz", 1980.0, 0.0, 2.0, NOW, "clock in effect"),
    Feature("freq_pending", "MHz", 1980.0, 0.0, 2.0, NOW, "newest requested clock"),
    Feature(
        "time_to_apply",
        "s",
        0.1,
        0.0,
        100.0,
        NOW,
        "until the newest clock is in effect; 0 when it is",
    ),
    Feature("actuation_delay", "s", 0.1, 0.0, 100.0, NOW, "expected delay of a clock request"),
    Feature("last_time", "s", 0.1, 0.0, 1000.0, LAST, "duration"),
    Feature("last_power", "W", 700.0, 0.0, 4.0, LAST, "mean power per GPU"),
]

PREFILL_SPEC = ObservationSpec(
    "prefill",
    1,
    tuple(
        [
            *_projected(
                "batch_tokens", "tokens", 2048.0, 0.0, 64.0, "new tokens; 0: no such batch"
            ),
            *_projected(
                "batch_attn", "token^2", 2048.0**2, 0.0, 1e4, "attention work sum n (n/2 + prefix)"
            ),
            *_projected("batch_requests", "requests", 32.0, 0.0, 64.0, "requests in it"),
            *_projected(
                "batch_completing",
                "requests",
                32.0,
                0.0,
                64.0,
                "requests whose first token it gives",
            ),
            *_projected(
                "batch_slack",
                "TTFT SLOs",
                1.0,
                -10.0,
                10.0,
                "tightest deadline minus now; 10: none completes",
            ),
            *_projected(
                "batch_slack_alive",
                "TTFT SLOs",
                1.0,
                -10.0,
                10.0,
                "tightest among deadlines not yet passed; 10: none",
            ),
            Feature(
                "queue_requests", "requests", 32.0, 0.0, 1e4, NOW, "requests waiting or partly done"
            ),
            Feature("queue_tokens", "tokens", 16384.0, 0.0, 1e4, NOW, "new tokens waiting"),
            Feature("oldest_wait", "TTFT SLOs", 1.0, 0.0, 1e3, NOW, "age of the oldest request"),
            *_RATES,
            *_CLOCK,
            Feature("slo", "s", 1.0, 0.0, 100.0, NOW, "TTFT bound"),
            Feature(
                "kv_backpressure",
                "share",
                1.0,
                0.0,
                1.0,
                NOW,
                "decode KV cache spoken for; 0 without a decode pool",
            ),
        ]
    ),
)

DECODE_SPEC = ObservationSpec(
    "decode",
    1,
    tuple(
        [
            Feature("batch", "requests", 256.0, 0.0, 64.0, NOW, "running requests"),
            Feature("cached_tokens", "tokens", 1e5, 0.0, 1e3, NOW, "tokens in the KV cache"),
            Feature("kv_use", "share", 1.0, 0.0, 1.0, NOW, "KV cache in use"),
            Feature(
                "recompute_tokens",
                "tokens",
                2048.0,
                0.0,
                1e3,
                NOW,
                "tokens the next iteration must recompute",
            ),
            Feature(
                "waiting_requests",
                "requests",
                32.0,
                0.0,
                1e4,
                NOW,
                "requests that wait for a place",
            ),
            Feature("waiting_tokens", "tokens", 16384.0, 0.0, 1e4, NOW, "their KV tokens"),
            Feature("oldest_wait", "s", 1.0, 0.0, 1e3, NOW, "age of the oldest waiting request"),
            Feature(
                "incoming_requests",
                "requests",
                32.0,
                0.0,
                1e4,
                NOW,
                "requests whose KV is in flight",
            ),
            Feature(
                "tpot_slack_min",
                "TPOT SLOs",
                10.0,
                -100.0,
                100.0,
                NOW,
                "tightest of: intervals so far x SLO - elapsed",
            ),
            Feature(
                "tpot_slack_mean",
                "TPOT SLOs",
                10.0,
                -100.0,
                100.0,
                NOW,
                "its mean over running requests",
            ),
            *_RATES,
            *_CLOCK,
            Feature("slo", "s", 0.1, 0.0, 100.0, NOW, "TPOT bound"),
        ]
    ),
)


def spec_for(phase: str) -> ObservationSpec:
    """Observation of a phase.

    Raises:
        BiscaleError: neither ``prefill`` nor ``decode``.
    """
    if phase not in ("prefill", "decode"):
        raise BiscaleError(f"unknown phase '{phase}': choose prefill or decode")
    return PREFILL_SPEC if phase == "prefill" else DECODE_SPEC
