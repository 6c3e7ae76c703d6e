"""Energy at equal attainment: what a policy spends where it keeps the same promise as another.

Tuning picks from a grid, and one step of it can cost three points of energy for 0.0002 of
attainment: to compare the settings that were picked compares grids. So every policy is a *curve*,
its settings in the plane of attainment and energy per token, and is read off at one attainment.
Where a curve does not reach it there is no number, and no difference is formed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.stats.bootstrap import LEVEL, percentile_interval
from biscale_env.evaluation.stats.windows import resampled_ratios

Floats = NDArray[np.float64]

Standing = Literal["reached", "above", "not reached"]
"""``above``: even the least-energy setting attains more than was asked."""

_TIE = 1e-12


@dataclass(frozen=True, eq=False)
class AttainmentCurve:
    """Totals of a policy's settings, summed over subsample seeds, on the windows of one workload.

    Attributes:
        energy_j: energy spent, shape (n_settings, n_windows), J.
        n_met: requests that met the SLO, likewise.
        n_counted: requests that could be judged, likewise.
        output_tokens: tokens made, likewise; without them energies are totals instead of J per
            token, which compares policies that do the same work.

    Raises:
        BiscaleError: on construction, arrays of different shape.
    """

    energy_j: Floats
    n_met: Floats
    n_counted: Floats
    output_tokens: Floats | None = None

    def __post_init__(self) -> None:
        for name in ("energy_j", "n_met", "n_counted", "output_tokens"):
            if getattr(self, name) is not None:
                values = np.atleast_2d(np.asarray(getattr(self, name), dtype=np.float64))
                object.__setattr__(self, name, values)
                if values.shape != self.energy_j.shape:
                    raise BiscaleError(
                        f"a curve needs arrays of one shape (settings, windows): energy_j has "
                        f"{self.energy_j.shape}, {name} {values.shape}"
                    )

    def attainments(self, weights: ArrayLike | None = None) -> Floats:
        """Attainment of each setting, shape (n_settings,); resampled, (n_resamples, n_settings)."""
        return np.clip(_share(self.n_met, self.n_counted, weights), 0.0, 1.0)

    def energies(self, weights: ArrayLike | None = None) -> Floats:
        """Energy per token of each setting, J; shapes as of :meth:`attainments`."""
        if self.output_tokens is not None:
            return _share(self.energy_j, self.output_tokens, weights)
        # a total as a mean over windows, so that resampling means the same in both cases
        n_windows = self.energy_j.shape[1]
        return n_windows * _share(self.energy_j, np.ones_like(self.energy_j), weights)


def _share(top: Floats, bottom: Floats, weights: ArrayLike | None) -> Floats:
    none = np.ones((1, top.shape[1]))
    nominal, resampled = resampled_ratios(
        top, bottom, none if weights is None else np.asarray(weights, dtype=np.float64)
    )
    return nominal if weights is None else resampled


class EnergyRatio(NamedTuple):
    """Energy of one policy over that of another at the same attainment.

    The first three are as in :class:`~biscale_env.evaluation.stats.bootstrap.Interval`.

    Attributes:
        estimate: the ratio; NaN where either curve does not reach the attainment.
        low: lower end of the interval, over the resamples in which both reach it.
        high: upper end.
        not_reached: fraction of resamples in which at least one does not; NaN without an estimate
            or with too few windows.
    """

    estimate: float
    low: float
    high: float
    not_reached: float


def energy_at(curve: AttainmentCurve, target: float) -> float:
    """Energy per token at an attainment, J.

    Read off the policy's frontier (settings that no other beats or equals in both attainment and
    energy), linear between neighbours. NaN where no setting reaches the target. On the lenient side
    there is no extrapolation: below the least-energy setting's attainment its own figure stands
    (:func:`standing` then says ``above``).

    Args:
        curve: the policy's settings.
        target: the attainment, in [0, 1].
    """
    return float(_Frontier.of(curve).read(np.array([target]))[0])


def standing(curve: AttainmentCurve, target: float) -> Standing:
    """Whether a curve is read at the target itself, at its lenient end above it, or not at all."""
    frontier = _Frontier.of(curve)
    if not frontier.settings.size or target > frontier.attained[-1] + _TIE:
        return "not reached"
    return "above" if frontier.attained[0] > target + _TIE else "reached"


def ratio_interval_at(
    curve_a: AttainmentCurve,
    curve_b: AttainmentCurve,
    target: float,
    weights: ArrayLike,
    level: float = LEVEL,
) -> EnergyRatio:
    """Energy of A over that of B at one attainment, the same windows resampled for both.

    In a resample a curve moves as a whole: misses by the same factor and energy by as much as at
    its settings at the target (between the two, in proportion), and it is read at the target again.
    To choose among settings anew in each resample would choose the luckiest one.

    Args:
        curve_a: settings of A.
        curve_b: settings of B on the same windows.
        target: the attainment, in [0, 1].
        weights: from :func:`biscale_env.evaluation.stats.windows.window_weights`.
        level: confidence level.

    Raises:
        BiscaleError: curves or weights of different windows.
    """
    return mean_ratio_interval_at([(curve_a, curve_b, target)], weights, level)


def mean_ratio_interval_at(
    pairs: Sequence[tuple[AttainmentCurve, AttainmentCurve, float]],
    weights: ArrayLike,
    level: float = LEVEL,
) -> EnergyRatio:
    """Mean of :func:`ratio_interval_at` over plants, each at its own attainment.

    The windows of all are resampled alike. There is no number where one of the curves does not
    reach its attainment: a mean over the plants that are easy would compare other plants.

    Args:
        pairs: curves of A and B and the attainment, in each plant.
        weights: as of :func:`ratio_interval_at`.
        level: confidence level.

    Raises:
        BiscaleError: curves or weights of different windows, or no pair at all.
    """
    drawn = np.asarray(weights, dtype=np.float64)
    each = [_resampled_ratio(*pair, drawn) for pair in pairs]
    if not each:
        raise BiscaleError("a ratio of energies needs the curves of one plant at least, got none")
    estimate = math.fsum(ratio for ratio, _ in each) / len(each)
    if math.isnan(estimate) or np.isnan(drawn).any():
        return EnergyRatio(estimate, math.nan, math.nan, math.nan)
    # the mean of what the plants that reach it deviate by: to keep only the resamples in which all
    # do would keep easy windows
    deviations = np.array([resampled - ratio for ratio, resampled in each])
    reached = np.isfinite(deviations)
    count = reached.sum(axis=0)
    total = np.where(reached, deviations, 0.0).sum(axis=0)
    ratios = np.where(count > 0, estimate + total / np.maximum(count, 1), np.nan)
    interval = percentile_interval(estimate, ratios, level)
    return EnergyRatio(*interval, not_reached=float(np.mean(~reached)))


def _resampled_ratio(
    curve_a: AttainmentCurve, curve_b: AttainmentCurve, target: float, drawn: Floats
) -> tuple[float, Floats]:
    """The ratio and its value in each resample; NaN: not reached."""
    n_windows = {curve_a.energy_j.shape[1], curve_b.energy_j.shape[1], drawn.shape[1]}
    if len(n_windows) > 1:
        raise BiscaleError(
            f"curves and weights must be of the same windows, got {sorted(n_windows)} of them"
        )
    energy = energy_at(curve_a, target), energy_at(curve_b, target)
    estimate = energy[0] / energy[1]
    if math.isnan(estimate) or np.isnan(drawn).any():
        return estimate, np.full(drawn.shape[0], np.nan)
    resampled = [_moved(curve, target, drawn) for curve in (curve_a, curve_b)]
    # linear in both, as `resampled_ratios`: with few and alike windows weights lie far from 1, and
    # both energies, which follow the load, may together come near 0
    return estimate, estimate * (1.0 + resampled[0] / energy[0] - resampled[1] / energy[1])


def _moved(curve: AttainmentCurve, target: float, weights: Floats) -> Floats:
    """Energy of a curve at the target in each resample, shape (n_resamples,); NaN: not reached."""
    frontier = _Frontier.of(curve)
    mix = frontier.mix(target, curve.energy_j.shape[0])
    misses = float((1.0 - curve.attainments()) @ mix)
    resampled = (1.0 - _share(curve.n_met, curve.n_counted, weights)) @ mix
    factor = np.maximum(resampled / misses, 1e-9) if misses > 0 else np.ones(len(resampled))
    dearer_j = (curve.energies(weights) - curve.energies()) @ mix
    return frontier.read(1.0 - (1.0 - target) / factor) + dearer_j


class _Frontier(NamedTuple):
    """Settings that no other beats or equals in both, by rising attainment (and so energy)."""

    settings: NDArray[np.int64]
    attained: Floats
    energy_j: Floats

    @classmethod
    def of(cls, curve: AttainmentCurve) -> "_Frontier":
        attained, energy_j = curve.attainments(), curve.energies()
        kept: list[int] = []
        for i in np.lexsort((energy_j, -attained)):
            usable = np.isfinite(attained[i]) and np.isfinite(energy_j[i])
            if usable and (not kept or energy_j[i] < energy_j[kept[-1]]):
                kept.append(int(i))
        rising = np.array(kept[::-1], dtype=np.int64)
        return cls(rising, attained[rising], energy_j[rising])

    def read(self, targets: Floats) -> Floats:
        """Energy at each of some attainments; NaN beyond the last setting."""
        if not self.settings.size:
            return np.full(np.shape(targets), np.nan)
        found = np.interp(targets, self.attained, self.energy_j)
        return np.where(targets > self.attained[-1] + _TIE, np.nan, found)

    def mix(self, target: float, n_settings: int) -> Floats:
        """Share of each setting at an attainment that is reached, shape (n_settings,)."""
        mixed = np.zeros(n_settings)
        for k, setting in enumerate(self.settings):
            unit = np.zeros(self.settings.size)
            unit[k] = 1.0
            mixed[setting] = np.interp(target, self.attained, unit)
        return mixed
