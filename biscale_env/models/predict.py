"""One iteration in numbers, with the spread of the ensemble: what `biscale predict` prints."""

from dataclasses import asdict, dataclass

import numpy as np

from biscale_env.core.errors import BiscaleError
from biscale_env.models.iteration_model import IterationModel

PERCENTILES = (5, 50, 95)
SPREAD = ("latency_s", "power_w", "energy_j", "freq_effective_mhz")


@dataclass(frozen=True)
class Prediction:
    """Latency, power and energy of one iteration.

    Attributes:
        model: model family.
        phase: ``prefill`` or ``decode``.
        dtype: ``bf16`` or ``fp8``.
        tp: GPUs of the instance.
        tokens: rows of the GEMMs: new prompt tokens, or running requests.
        freq_requested_mhz: clock that was asked for, MHz.
        freq_effective_mhz: clock under the power cap, MHz.
        latency_s: duration, s.
        power_w: mean power per GPU, W.
        energy_j: energy of the instance, all ``tp`` GPUs: ``tp * power_w * latency_s``, J.
        energy_per_token_j: energy per new prompt token or per output token, J.
        freq_best_mhz: clock at which this iteration takes the least energy, MHz.
        inside_box: whether the work lies in the validity domain of the fit; a key of the JSON.
        spread: 5th, 50th and 95th percentile over the ensemble; empty without one.
    """

    model: str
    phase: str
    dtype: str
    tp: int
    tokens: int
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
    model: IterationModel, work: Work, freq_mhz: float, member: int | None
) -> dict[str, float]:
    return {
        "latency_s": float(model.latency_s(*work, freq_mhz, member)),
        "power_w": float(model.power_w(*work, freq_mhz, member)),
        "energy_j": float(model.energy_j(*work, freq_mhz, member)),
        "freq_effective_mhz": float(model.effective_freq_mhz(*work, freq_mhz, member)),
    }


def predict(model: IterationModel, work: Work, freq_mhz: float) -> Prediction:
    """Predict one iteration.

    Args:
        model: the model.
        work: (tokens, attn_work, cached, n_seq).
        freq_mhz: requested clock, MHz.

    Raises:
        BiscaleError: the GPU cannot run this clock, or the KV cache of the work does not fit.
    """
    freq = model.gpu.check_clock(freq_mhz)
    tokens, attn_work, cached, n_seq = work
    nominal = _numbers(model, work, freq, None)
    members = [_numbers(model, work, freq, k) for k in range(model.n_members)]
    spread = {
        key: {f"p{q}": float(np.percentile([d[key] for d in members], q)) for q in PERCENTILES}
        for key in SPREAD
        if members
    }
    return Prediction(
        model=model.name,
        phase=model.phase,
        dtype=model.dtype,
        tp=model.tp,
        tokens=int(tokens),
        freq_requested_mhz=freq,
        **nominal,
        energy_per_token_j=nominal["energy_j"] / tokens,
        freq_best_mhz=float(model.optimal_freq_mhz(*work)),
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


def predict_prefill(
    model: IterationModel, tokens: int, requests: int, prefix: int, freq_mhz: float
) -> Prediction:
    """Predict a prefill batch.

    Args:
        model: a prefill model.
        tokens: new prompt tokens of the whole batch, divided equally among the requests.
        requests: prompts in the batch.
        prefix: tokens per request that are cached already.
        freq_mhz: requested clock, MHz.

    Raises:
        BiscaleError: an impossible number, clock or configuration.
    """
    _at_least("the number of requests", requests, 1)
    _at_least("the number of tokens", tokens, requests)
    _at_least("the prefix", prefix, 0)
    _check_kv_cache(model, tokens + requests * prefix)
    each = tokens / requests
    return predict(
        model, (float(tokens), tokens * (each / 2.0 + prefix), 0.0, float(requests)), freq_mhz
    )


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
    return predict(model, (float(batch), 0.0, float(batch) * context, float(batch)), freq_mhz)
