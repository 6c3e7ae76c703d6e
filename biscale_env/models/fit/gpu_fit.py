"""The fit of a GPU's layer: kernels by clock, servers at the default clock, idle power.

Every field has a prior; the fit is the maximum of the posterior. Members of the ensemble are
randomised maxima: evidence is moved by its noise, priors by their spread, and everything is fitted
again. What differs from one LLM to the next (`Noise.server_power`) is in the LLM's own layer
(`energy_factor`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from biscale_env.config import Gpu
from biscale_env.models import physics
from biscale_env.models.fit.gpu_evidence import (
    GpuEvidence,
    KernelPoint,
    ServingGroup,
    ServingPoint,
)
from biscale_env.models.fit.profile_table import IterationWork
from biscale_env.models.fit.server_model import (
    Mixture,
    ServerPrediction,
    capped_clock_ghz,
    mixture,
    predict_server,
)
from biscale_env.models.gemm import gemm_coefficients
from biscale_env.models.gpu_layer import HOST_FIELDS, LAYER_FIELDS, names_in_layer
from biscale_env.models.physics import Coefficients

Floats = NDArray[np.float64]
GHZ: Final = 1e-3  # of a MHz
NOT_FITTED: Final = ("delay_s", "core_share", "freq_profile_ghz")
STEP: Final = 1e-3  # of the finite differences, in standard deviations of the prior
MAX_EVALUATIONS: Final = 40


@dataclass(frozen=True)
class ServerWork:
    """A measured server with the work of its LLM.

    Attributes:
        group: the measurements.
        work: coefficients of the LLM's layer (``physics.WORK_FIELDS`` without host times), decode,
            both attention terms filled in.
        prompt_tokens: mean prompt length.
        mixtures: iterations of every point.
    """

    group: ServingGroup
    work: Mapping[str, float]
    prompt_tokens: float
    mixtures: tuple[Mixture, ...]


def server_work(
    ev: GpuEvidence, group: ServingGroup, work: Mapping[str, float], prompt_tokens: float
) -> ServerWork:
    """Iterations of a measured server."""
    mixes = tuple(
        mixture(p, prompt_tokens, context_tokens(ev, p, prompt_tokens)) for p in group.points
    )
    return ServerWork(group, work, prompt_tokens, mixes)


def context_tokens(ev: GpuEvidence, point: ServingPoint, prompt_tokens: float) -> float:
    """Mean KV tokens of a running request."""
    return prompt_tokens + ev.serving.output_age_share * point.output_tokens


@dataclass(frozen=True)
class HostTime:
    """Host time of an iteration: constant and per request, s."""

    host0_s: float
    host_s_per_seq: float


def server_coefficients(
    values: Mapping[str, float], gpu: Gpu, server: ServerWork, host: HostTime, factor: float = 1.0
) -> Coefficients:
    """Complete coefficients of a measured server; ``factor`` is that of its work's energy."""
    dtype = server.group.dtype
    own = {name: values[column] for name, column in names_in_layer("decode", dtype).items()}
    found = {
        **own,
        **server.work,
        "host0_s": host.host0_s,
        "host_s_per_seq": host.host_s_per_seq,
        "energy_factor": factor,
        "p_cap_w": gpu.power_cap_w,
    }
    return Coefficients(**{name: found[name] for name in Coefficients._fields})


def predict_points(
    ev: GpuEvidence,
    gpu: Gpu,
    values: Mapping[str, float],
    server: ServerWork,
    host: HostTime,
    factor: float = 1.0,
) -> list[ServerPrediction]:
    """What the formula says about every point of a server."""
    c = server_coefficients(values, gpu, server, host, factor)
    return [
        predict_server(c, mix, ev.serving.freq_mhz * GHZ, gpu.freq_min_mhz * GHZ)
        for mix in server.mixtures
    ]


def predict_kernels(
    points: Sequence[KernelPoint], gpu: Gpu, values: Mapping[str, float]
) -> tuple[Floats, Floats]:
    """Duration in s and power in W of measured GEMMs at their requested clocks."""
    time, power = np.empty(len(points)), np.empty(len(points))
    shapes = {(p.k, p.n, p.dtype) for p in points}
    for k, n, dtype in sorted(shapes):
        at = [i for i, p in enumerate(points) if (p.k, p.n, p.dtype) == (k, n, dtype)]
        c = gemm_coefficients(dict(values), gpu, dtype, k, n)
        rows = np.array([points[i].rows for i in at])
        zero, one = np.zeros_like(rows), np.ones_like(rows)
        w = IterationWork(rows, zero, zero, one)
        asked = np.array([points[i].freq_mhz for i in at]) * GHZ
        f = capped_clock_ghz(c, w, asked, gpu.freq_min_mhz * GHZ)
        time[at] = physics.latency_s(c, *w.as_tuple(), f)
        power[at] = physics.power_w(c, *w.as_tuple(), f)
    return time, power


def correlated(sigma: Floats, labels: Sequence[str], group: float, shared: float) -> Floats:
    """Covariance of relative errors: each its own, one per label, one of all together."""
    names = np.array(labels, dtype=str)
    same = names[:, None] == names[None, :]
    cov: Floats = np.diag(sigma**2) + group**2 * same + shared**2
    return cov


@dataclass
class GpuFit:
    """The posterior of one GPU's layer.

    Attributes:
        ev: the evidence.
        gpu: its description.
        servers: measured servers with their work.
        hosts: host time of each, by label.
    """

    ev: GpuEvidence
    gpu: Gpu
    servers: Sequence[ServerWork]
    hosts: Mapping[str, HostTime]

    def __post_init__(self) -> None:
        """Fix what does not change while fitting: the fields, the targets and their weights."""
        prior = self.ev.prior
        self.fields = tuple(
            n
            for n in LAYER_FIELDS
            if not n.endswith(HOST_FIELDS)
            and n not in NOT_FITTED
            and not prior[n].fixed
            and prior[n].sigma > 0
        )
        points = self.ev.kernels.points
        noise = self.ev.noise
        self.kernel_time_s = np.array([p.time_us * 1e-6 for p in points])
        self.kernel_power_w = np.array([p.power_w for p in points])
        long = self.kernel_time_s >= self.ev.kernels.long_us * 1e-6
        own = np.where(long, noise.kernel_power, noise.short_kernel_power)
        self._kernel_sigma = own
        self.server_power_w = np.array([p.power_w for s in self.servers for p in s.group.points])
        labels = [s.group.label for s in self.servers for _ in s.group.points]
        point = np.full(len(labels), noise.serving_power)
        self._kernel_root = _root(correlated(own, ["kernels"] * len(own), 0.0, noise.kernel_gain))
        self._server_root = _root(correlated(point, labels, noise.server_power, noise.server_gain))

    def values(self, z: Floats, fixed: Mapping[str, float]) -> dict[str, float]:
        """Fields of the layer from standardised parameters; the rest as given."""
        out = dict(fixed)
        for name, x in zip(self.fields, z, strict=True):
            p = self.ev.prior[name]
            out[name] = float(p.mean * np.exp(p.sigma * x) if p.log else p.mean + p.sigma * x)
        return out

    def bounds(self) -> tuple[Floats, Floats]:
        """Bounds of the standardised parameters."""
        low, high = [], []
        for name in self.fields:
            p = self.ev.prior[name]
            low.append(p.pull(p.low))
            high.append(p.pull(p.high))
        return np.array(low) - 1e-9, np.array(high) + 1e-9

    def residuals(self, z: Floats, fixed: Mapping[str, float], moved: "Moved") -> Floats:
        """Whitened errors of all evidence, and the distance from the (moved) priors."""
        v = self.values(z, fixed)
        parts: list[Floats] = [z - moved.prior]
        if self.ev.kernels.points:
            time, power = predict_kernels(self.ev.kernels.points, self.gpu, v)
            error = power / (self.kernel_power_w * moved.kernel_power) - 1.0
            parts.append(_whitened(self._kernel_root, error))
            own = time / (self.kernel_time_s * moved.kernel_time) - 1.0
            parts.append(own / self.ev.noise.kernel_time)
        if self.servers:
            power = np.array(
                [
                    q.power_w
                    for s in self.servers
                    for q in predict_points(self.ev, self.gpu, v, s, self.hosts[s.group.label])
                ]
            )
            error = power / (self.server_power_w * moved.server_power) - 1.0
            parts.append(_whitened(self._server_root, error))
        for p, factor in zip(self.ev.idle, moved.idle_w, strict=True):
            idle = _idle_w(v, p.freq_mhz * GHZ)
            parts.append(np.array([(idle - p.power_w - factor) / p.sigma_w]))
        return np.concatenate(parts)

    def solve(
        self, fixed: Mapping[str, float], moved: "Moved", start: Floats | None = None
    ) -> Floats:
        """Maximum of the posterior for (moved) evidence: standardised parameters."""
        low, high = self.bounds()
        x0 = np.clip(np.zeros(len(self.fields)) if start is None else start, low, high)
        found = least_squares(
            self.residuals,
            x0,
            bounds=(low - 1e-6, high + 1e-6),
            args=(fixed, moved),
            diff_step=STEP,
            x_scale=1.0,
            xtol=1e-4,
            ftol=1e-5,
            max_nfev=MAX_EVALUATIONS,
        )
        return np.clip(found.x, low, high)

    def unmoved(self) -> "Moved":
        """The evidence as it is."""
        k, s = len(self.ev.kernels.points), self.server_power_w.size
        return Moved(
            np.zeros(len(self.fields)), np.ones(k), np.ones(k), np.ones(s),
            np.zeros(len(self.ev.idle)),
        )  # fmt: skip

    def moved(self, rng: np.random.Generator) -> "Moved":
        """The evidence moved by its noise, once."""
        n, k = self.ev.noise, self.kernel_time_s.size
        return Moved(
            rng.normal(size=len(self.fields)),
            1.0 + rng.normal(0.0, n.kernel_time, k),
            1.0 + rng.normal(0.0, 1.0, k) * self._kernel_sigma + rng.normal(0.0, n.kernel_gain),
            1.0
            + rng.normal(0.0, n.serving_power, self.server_power_w.size)
            + rng.normal(0.0, n.server_gain),
            np.array([rng.normal(0.0, p.sigma_w) for p in self.ev.idle]),
        )


@dataclass(frozen=True)
class Moved:
    """How far the evidence is moved: factors of measurements, shifts of priors.

    Attributes:
        prior: means of the standardised parameters.
        kernel_time: factor per kernel.
        kernel_power: factor per kernel.
        server_power: factor per serving point.
        idle_w: shift per idle point, W.
    """

    prior: Floats
    kernel_time: Floats
    kernel_power: Floats
    server_power: Floats
    idle_w: Floats


def _root(covariance: Floats) -> Floats:
    """Lower triangular root of a covariance; empty of an empty one."""
    if covariance.size == 0:
        return covariance
    return np.asarray(np.linalg.cholesky(covariance), dtype=np.float64)


def _whitened(root: Floats, error: Floats) -> Floats:
    return np.asarray(np.linalg.solve(root, error), dtype=np.float64)


def _idle_w(values: Mapping[str, float], freq_ghz: float) -> float:
    own = {name: values.get(name, 0.0) for name in Coefficients._fields}
    return float(physics.idle_power_w(Coefficients(**own), freq_ghz))


def fixed_values(ev: GpuEvidence, rng: np.random.Generator | None = None) -> dict[str, float]:
    """Every field at its prior's mean, or sampled from it."""
    return {name: p.mean if rng is None else p.sample(rng) for name, p in ev.prior.items()}
