"""Iterations in numbers, with the spread of the ensemble: what `biscale predict` prints."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.models.iteration_model import IterationModel

PERCENTILES = (5, 50, 95)
SPREAD = ("latency_s", "power_w", "energy_j", "freq_effective_mhz")


@dataclass(frozen=True)
class Prediction:
    """Latency, power and energy of one iteration, or of several that run one after the other.

    Attributes:
        model: model family.
        phase: ``prefill`` or ``decode``.
        dtype: ``bf16`` or ``fp8``.
        tp: GPUs of the instance.
        tokens: rows of the GEMMs: new prompt tokens, or running requests.
        iterations: how many there are.
        freq_requested_mhz: clock that was asked for, MHz.
        freq_effective_mhz: clock under the power cap, MHz; the mean over time.
        latency_s: duration of all of them, s.
        power_w: mean power per GPU, W.
        energy_j: energy of the instance, all ``tp`` GPUs: ``tp * power_w * latency_s``, J.
        energy_per_token_j: energy per new prompt token or per output token, J.
        freq_best_mhz: clock at which this work takes the least energy, MHz.
        inside_box: whether the work lies in the validity domain of the fit; a key of the JSON.
        spread: 5th, 50th and 95th percentile over the ensemble; empty without one.
    """

    model: str
    phase: str
    dtype: str
    tp: int
    tokens: int
    iterations: int
    freq_requested_mhz: float
    freq_effective_mhz: float
    latency_s: float
    power_w: float
    energy_j: float
    energy_per_token_j: float
    freq_best_mhz: float
    inside_box: bool
    spread: dict[str, dict[str, float]]

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


Work = tuple[float, float, float, float]


def _numbers(
    model: IterationModel, works: NDArray[np.float64], freq_mhz: float, member: int | None
) -> dict[str, float]:
    """Sums and means over iterations; ``works`` has shape (iterations, 4)."""
    t, a, k, n = works.T
    time = model.latency_s(t, a, k, n, freq_mhz, member)
    energy = float(np.sum(model.energy_j(t, a, k, n, freq_mhz, member)))
    clock = model.effective_freq_mhz(t, a, k, n, freq_mhz, member)
    total = float(np.sum(time))
    return {
        "latency_s": total,
        "power_w": energy / total / model.tp,
        "energy_j": energy,
        "freq_effective_mhz": float(np.sum(clock * time)) / total,
    }


def _best_clock_mhz(model: IterationModel, works: NDArray[np.float64]) -> float:
    """Clock of the GPU at which all iterations together take the least energy, MHz."""
    clocks = model.gpu.clocks_mhz
    t, a, k, n = works.T[:, :, None]
    energy = model.energy_j(t, a, k, n, clocks)
    return float(clocks[np.argmin(np.sum(energy, axis=0))])


def predict(model: IterationModel, works: Sequence[Work], freq_mhz: float) -> Prediction:
    """Predict iterations that run one after the other at one requested clock.

    Args:
        model: the model.
        works: (tokens, attn_work, cached, n_seq) of each.
        freq_mhz: requested clock, MHz.

    Raises:
        BiscaleError: the GPU cannot run this clock.
    """
    freq = model.gpu.check_clock(freq_mhz)
    table = np.array(works, dtype=np.float64).reshape(-1, 4)
    nominal = _numbers(model, table, freq, None)
    members = [_numbers(model, table, freq, k) for k in range(model.n_members)]
    spread = {
        key: {f"p{q}": float(np.percentile([d[key] for d in members], q)) for q in PERCENTILES}
        for key in SPREAD
        if members
    }
    tokens, attn_work, cached, n_seq = table.T
    return Prediction(
        model=model.name,
        phase=model.phase,
        dtype=model.dtype,
        tp=model.tp,
        tokens=int(tokens.sum()),
        iterations=len(table),
        freq_requested_mhz=freq,
        **nominal,
        energy_per_token_j=nominal["energy_j"] / float(tokens.sum()),
        freq_best_mhz=_best_clock_mhz(model, table),
        inside_box=model.contains(
            tokens=tokens, attn_work=attn_work, cached=cached, n_seq=n_seq, freq_mhz=freq
        ),
        spread=spread,
    )


def _at_least(what: str, value: int, least: int) -> None:
    if value < least:
        raise BiscaleError(f"{what} is {value}, but must be at least {least}")


def _check_kv_cache(model: IterationModel, kv_tokens: int) -> None:
    capacity = model.llm.kv_capacity_tokens(model.gpu, model.tp, model.content.dtype)
    if kv_tokens > capacity:
        config = f"{model.dtype} at TP {model.tp}"
        raise BiscaleError(
            f"{kv_tokens} tokens do not fit into the KV cache of {config}, which holds {capacity}"
        )


def check_prefill(model: IterationModel, tokens: int, requests: int, prefix: int) -> None:
    """Check that a prefill batch is possible.

    Args:
        model: a prefill model.
        tokens: new prompt tokens of the whole batch, divided equally among the requests.
        requests: prompts in the batch.
        prefix: tokens per request that are cached already.

    Raises:
        BiscaleError: an impossible number, or the KV cache has no room.
    """
    _at_least("the number of requests", requests, 1)
    _at_least("the number of tokens", tokens, requests)
    _at_least("the prefix", prefix, 0)
    _check_kv_cache(model, tokens + requests * prefix)


def predict_prefill(
    model: IterationModel, tokens: int, requests: int, prefix: int, freq_mhz: float
) -> Prediction:
    """Predict prompts that run as one batch; arguments as in :func:`check_prefill`.

    Raises:
        BiscaleError: an impossible number, clock or configuration.
    """
    check_prefill(model, tokens, requests, prefix)
    each = tokens / requests
    work = (float(tokens), tokens * (each / 2.0 + prefix), 0.0, float(requests))
    return predict(model, [work], freq_mhz)


def predict_decode(model: IterationModel, batch: int, context: int, freq_mhz: float) -> Prediction:
    """Predict a decode iteration.

    Args:
        model: a decode model.
        batch: running requests.
        context: KV-cache tokens per request.
        freq_mhz: requested clock, MHz.

    Raises:
        BiscaleError: an impossible number, clock or configuration.
    """
    _at_least("the batch", batch, 1)
    _at_least("the context", context, 0)
    _check_kv_cache(model, batch * context)
    work = (float(batch), 0.0, float(batch) * context, float(batch))
    return predict(model, [work], freq_mhz)
