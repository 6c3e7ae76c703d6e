"""The predictors of BiScale, fitted on noisy measurements of a plant.

A nominal model for a controller that is not given the formula.

As in the paper (arXiv 2602.18755): histogram gradient-boosted trees for latency; for prefill power
a table with linear interpolation, for decode power a regression monotone in the clock; features:
requests, sum, mean and standard deviation of the lengths, clock. The tensor parallel degree is no
feature because every instance is fitted alone. Reported errors there: 2.9 / 2.7 % latency, 4.1 /
1.0 % power.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import RegularGridInterpolator
from sklearn.ensemble import HistGradientBoostingRegressor
from threadpoolctl import threadpool_limits

from biscale_env.core.errors import BiscaleError
from controllers.base import Floats, PolicyContext
from controllers.surrogates.trees import CompiledTrees

# relative: run-to-run noise of real decode iterations is 0.6 to 1.1 % (25.8k vLLM iterations)
LATENCY_NOISE = 0.01
POWER_NOISE = (
    0.025  # relative, assumed: half the +-5 % gain error of H100 power readings (arXiv 2312.02741)
)
SAMPLES = 4000  # assumed: an hour of profiling at one point per second
FREQ = 4  # column of the clock in the features
Work = tuple[Floats, Floats, Floats, Floats, Floats]  # tokens, attn_work, cached, n_seq, clock
_fitted: dict[tuple[Any, ...], "BoostedModel"] = {}


def features(
    tokens: Floats, attn_work: Floats, cached: Floats, n_seq: Floats, freq_mhz: Floats
) -> Floats:
    """Features (n, 6) of work (n,).

    Requests, sum, mean, standard deviation of lengths, clock, cached tokens.

    The lengths are those of the prompts in prefill (their second moment is twice the attention
    work); in decode they are contexts, of which only the sum is known.
    """
    seqs = np.maximum(n_seq, 1.0)
    total = np.where(cached > 0.0, cached, tokens)
    mean = total / seqs
    spread = np.where(cached > 0.0, 0.0, np.sqrt(np.maximum(2.0 * attn_work / seqs - mean**2, 0.0)))
    return np.stack([n_seq, total, mean, spread, freq_mhz, tokens], axis=-1)


def sample_work(context: PolicyContext, n: int, rng: np.random.Generator) -> Work:
    """Work as an engine would meet it, log-uniform in size: five arrays (n,), clock in MHz last."""
    freq = rng.choice(context.clocks.grid_mhz, n)
    if context.phase == "decode":
        batch = np.rint(np.exp(rng.uniform(0.0, np.log(context.max_seqs), n)))
        each = np.exp(rng.uniform(np.log(32.0), np.log(8192.0), n))
        cached = np.minimum(batch * each, context.kv_capacity_tokens)
        return batch, np.zeros(n), cached, batch, freq
    tokens = np.rint(np.exp(rng.uniform(np.log(8.0), np.log(context.token_budget), n)))
    n_seq = np.minimum(np.rint(np.exp(rng.uniform(0.0, np.log(16.0), n))), tokens)
    parts = rng.dirichlet(np.ones(16), n) * (np.arange(16) < n_seq[:, None])
    lengths = tokens[:, None] * parts / parts.sum(axis=1, keepdims=True)
    return tokens, 0.5 * (lengths**2).sum(axis=1), np.zeros(n), n_seq, freq


@dataclass(frozen=True)
class BoostedModel:
    """Fitted predictors with the methods of `IterationModel` that controllers use.

    ``member`` is accepted and ignored.

    Attributes:
        phase: phase that it was fitted for.
        latency: trees for log latency (s).
        power: predictor of the mean power of a GPU (W) from features (n, 6).
        n_gpus: GPUs of the instance.
        errors: mean absolute relative errors on held-out noiseless points: ``latency_mape``,
            ``power_mape``.
    """

    phase: str
    latency: CompiledTrees
    power: Any
    n_gpus: float
    clocks_mhz: Floats
    errors: dict[str, float] = field(default_factory=dict)

    def _features(self, *work: ArrayLike) -> tuple[Floats, tuple[int, ...]]:
        parts = np.broadcast_arrays(*(np.asarray(w, dtype=np.float64) for w in work))
        return features(*(p.ravel() for p in parts)), parts[0].shape

    def latency_s(
        self,
        tokens: ArrayLike,
        attn_work: ArrayLike,
        cached: ArrayLike,
        n_seq: ArrayLike,
        freq_mhz: ArrayLike,
        member: int | None = None,
    ) -> Floats:
        """Predicted duration of the iteration, s; broadcast shape."""
        x, shape = self._features(tokens, attn_work, cached, n_seq, freq_mhz)
        return np.exp(self.latency.predict(x)).reshape(shape)

    def power_w(
        self,
        tokens: ArrayLike,
        attn_work: ArrayLike,
        cached: ArrayLike,
        n_seq: ArrayLike,
        freq_mhz: ArrayLike,
        member: int | None = None,
    ) -> Floats:
        """Predicted mean power of one GPU, W; broadcast shape."""
        x, shape = self._features(tokens, attn_work, cached, n_seq, freq_mhz)
        return np.asarray(self.power(x)).reshape(shape)

    def energy_j(
        self,
        tokens: ArrayLike,
        attn_work: ArrayLike,
        cached: ArrayLike,
        n_seq: ArrayLike,
        freq_mhz: ArrayLike,
        member: int | None = None,
    ) -> Floats:
        """Predicted energy of the instance, J; broadcast shape."""
        x, shape = self._features(tokens, attn_work, cached, n_seq, freq_mhz)
        return (self.n_gpus * self.power(x) * np.exp(self.latency.predict(x))).reshape(shape)

    def optimal_freq_mhz(
        self,
        tokens: ArrayLike,
        attn_work: ArrayLike,
        cached: ArrayLike,
        n_seq: ArrayLike,
        member: int | None = None,
    ) -> Floats:
        """Clock of the grid with the least predicted energy, MHz."""
        t, a, c, n = (
            np.asarray(w, dtype=np.float64)[..., None] for w in (tokens, attn_work, cached, n_seq)
        )
        return self.clocks_mhz[np.argmin(self.energy_j(t, a, c, n, self.clocks_mhz), axis=-1)]


class PowerTable:
    """Prefill power as a table over (tokens, requests, clock) with linear interpolation.

    Monotone in the clock by construction.
    """

    def __init__(self, x: Floats, power_w: Floats, context: PolicyContext) -> None:
        """Fill the cells with mean measurements, non-decreasing in the clock."""
        self._tokens = np.geomspace(8.0, context.token_budget, 11)
        self._seqs = np.array([1.0, 4.0, 16.0])
        self._freq = np.linspace(context.clocks.freq_min_mhz, context.clocks.freq_max_mhz, 22)
        axes = (np.log(self._tokens), np.log(self._seqs), self._freq)
        points = (np.log(np.maximum(x[:, 1], 1.0)), np.log(np.maximum(x[:, 0], 1.0)), x[:, FREQ])
        cells = tuple(
            np.abs(p[:, None] - a).argmin(axis=1) for p, a in zip(points, axes, strict=True)
        )
        count, total = np.zeros((11, 3, 22)), np.zeros((11, 3, 22))
        np.add.at(count, cells, 1.0)
        np.add.at(total, cells, power_w)
        table = np.where(count > 0, total / np.maximum(count, 1.0), np.nan)
        flat = np.nanmean(table, axis=1, keepdims=True)
        table = np.maximum.accumulate(np.where(np.isnan(table), flat, table), axis=2)
        self._interpolate = RegularGridInterpolator(
            axes, table, bounds_error=False, fill_value=None
        )

    def __call__(self, x: Floats) -> Floats:
        """Power in W for features (n, 6)."""
        tokens = np.clip(x[:, 1], self._tokens[0], self._tokens[-1])
        seqs = np.clip(x[:, 0], self._seqs[0], self._seqs[-1])
        freq = np.clip(x[:, FREQ], self._freq[0], self._freq[-1])
        return np.asarray(
            self._interpolate(np.stack([np.log(tokens), np.log(seqs), freq], axis=-1))
        )


def _trees(x: Floats, y: Floats, monotone: list[int], seed: int) -> CompiledTrees:
    fitted = HistGradientBoostingRegressor(
        max_iter=150, learning_rate=0.1, monotonic_cst=monotone, random_state=seed
    )
    with threadpool_limits(
        1, user_api="openmp"
    ):  # on a busy machine its threads wait for each other for minutes
        return CompiledTrees(fitted.fit(x, y))


def fit_boosted(context: PolicyContext, samples: int = SAMPLES, seed: int = 0) -> BoostedModel:
    """Fit the predictors on noisy measurements of ``context.model`` (member ``context.member``).

    Args:
        context: gives the plant to measure and the range of work.
        samples: measurements.
        seed: of work, noise and trees.

    Raises:
        BiscaleError: too few samples.
    """
    if samples < 500:
        raise BiscaleError(f"a predictor needs at least 500 samples, got {samples}")
    rng = np.random.default_rng(seed)
    work = sample_work(context, samples, rng)
    model, member = context.model, context.member
    x = features(*work)
    latency = model.latency_s(*work, member) * np.exp(rng.normal(0.0, LATENCY_NOISE, samples))
    power_w = model.power_w(*work, member) * np.exp(rng.normal(0.0, POWER_NOISE, samples))
    latency_trees = _trees(x, np.log(latency), [0, 0, 0, 0, -1, 0], seed)
    power = (
        PowerTable(x, power_w, context)
        if context.phase == "prefill"
        else _trees(x, power_w, [0, 0, 0, 0, 1, 0], seed).predict
    )
    fitted = BoostedModel(
        context.phase,
        latency_trees,
        power,
        float(model.member(member).n_gpus),
        context.clocks.grid_mhz,
    )
    return _with_errors(fitted, context, rng)


def _with_errors(
    fitted: BoostedModel, context: PolicyContext, rng: np.random.Generator
) -> BoostedModel:
    """Measure the errors on fresh noiseless points."""
    work = sample_work(context, 4000, rng)
    model, member = context.model, context.member
    fitted.errors["latency_mape"] = float(
        np.mean(np.abs(fitted.latency_s(*work) / model.latency_s(*work, member) - 1.0))
    )
    fitted.errors["power_mape"] = float(
        np.mean(np.abs(fitted.power_w(*work) / model.power_w(*work, member) - 1.0))
    )
    return fitted


def boosted(context: PolicyContext) -> BoostedModel:
    """The predictors for a context, fitted once per process."""
    m = context.model
    key = (
        m.phase,
        m.tp,
        m.dtype,
        m.name,
        context.member,
        context.token_budget,
        context.max_seqs,
        context.clocks,
    )
    if key not in _fitted:
        _fitted[key] = fit_boosted(context)
    return _fitted[key]
