"""Host and scheduling time: what measured median intervals show beyond the kernels.

Per server a constant and a time per running request, held to the prior of the evidence file. How
much servers differ is the spread that members of an LLM without measurements get.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from biscale_env.config import Gpu
from biscale_env.models.fit.gpu_evidence import GpuEvidence
from biscale_env.models.fit.gpu_fit import HostTime, ServerWork, predict_points

Floats = NDArray[np.float64]
NO_HOST = HostTime(0.0, 0.0)


@dataclass(frozen=True)
class MeasuredLlm:
    """What measured servers of one LLM say beyond the GPU's layer.

    Attributes:
        host: their host times.
        energy_factor: energy of work against the layer's.
        spread: standard deviation of its logarithm.
    """

    host: "HostFit"
    energy_factor: float
    spread: float


@dataclass(frozen=True)
class HostFit:
    """Host times of measured servers.

    Attributes:
        by_server: label to host time.
        mean: over servers.
        spread: standard deviation over servers.
    """

    by_server: Mapping[str, HostTime]
    mean: HostTime
    spread: HostTime


def fit_host(
    ev: GpuEvidence, gpu: Gpu, values: Mapping[str, float], servers: Sequence[ServerWork]
) -> HostFit:
    """Host time of every server, from the layer as fitted so far."""
    found = {s.group.label: _of_server(ev, gpu, values, s) for s in servers}
    if not found:
        p = ev.prior
        names = ("decode_host0_s", "decode_host_s_per_seq")
        return HostFit(
            {}, HostTime(*(p[n].mean for n in names)), HostTime(*(p[n].sigma for n in names))
        )
    table = np.array([(h.host0_s, h.host_s_per_seq) for h in found.values()])
    mean = table.mean(axis=0)
    spread = table.std(axis=0, ddof=1) if len(table) > 1 else mean / 2.0
    return HostFit(found, HostTime(*map(float, mean)), HostTime(*map(float, spread)))


def _of_server(
    ev: GpuEvidence, gpu: Gpu, values: Mapping[str, float], server: ServerWork
) -> HostTime:
    """Least squares on relative errors of the medians, with the prior as two more equations."""
    batch = np.array([p.batch for p in server.group.points])
    target = np.array([p.itl_p50_s for p in server.group.points])
    kernels = np.array([q.itl_p50_s for q in predict_points(ev, gpu, values, server, NO_HOST)])
    weight = 1.0 / (ev.noise.itl * target)
    priors = [ev.prior["decode_host0_s"], ev.prior["decode_host_s_per_seq"]]
    rows = np.vstack(
        [np.column_stack([weight, weight * batch]), np.diag([1.0 / p.sigma for p in priors])]
    )
    right = np.concatenate([(target - kernels) * weight, [p.mean / p.sigma for p in priors]])
    x = np.linalg.lstsq(rows, right, rcond=None)[0]
    return HostTime(*(float(np.clip(v, p.low, p.high)) for v, p in zip(x, priors, strict=True)))


def fit_energy_factor(
    ev: GpuEvidence,
    gpu: Gpu,
    values: Mapping[str, float],
    servers: Sequence[ServerWork],
    hosts: Mapping[str, HostTime],
) -> tuple[float, float]:
    """Energy of an LLM's work against the layer's: mean over its servers, shrunk towards 1.

    Power under the cap says nothing, so the factor is found by its effect on power, not by a ratio.

    Returns:
        The factor and the standard deviation of its logarithm.
    """

    def errors(log_factor: float) -> float:
        per_server = [
            np.mean(
                [
                    np.log(q.power_w / p.power_w)
                    for p, q in zip(
                        s.group.points,
                        predict_points(
                            ev, gpu, values, s, hosts[s.group.label], float(np.exp(log_factor))
                        ),
                        strict=True,
                    )
                ]
            )
            for s in servers
        ]
        return float(np.mean(per_server))

    prior, server = ev.noise.server_power, ev.noise.server_power
    n = len(servers)
    weight = prior**2 / (prior**2 + server**2 / n)
    low, high = -3.0 * prior, 3.0 * prior
    whole = brentq(errors, low, high) if errors(low) < 0.0 < errors(high) else 0.0
    return float(np.exp(weight * whole)), float(prior * np.sqrt(1.0 - weight))


def sample_host(fit: HostFit, rng: np.random.Generator) -> HostTime:
    """Host time of an LLM that was not measured: as measured servers differ."""
    drawn = [
        max(rng.normal(mean, spread), 0.0)
        for mean, spread in (
            (fit.mean.host0_s, fit.spread.host0_s),
            (fit.mean.host_s_per_seq, fit.spread.host_s_per_seq),
        )
    ]
    return HostTime(*map(float, drawn))
