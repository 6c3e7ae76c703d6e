"""Reading a co-located server.

Which iterations it runs, how long they take, how much prefill they hold.

In a co-located server every request passes once through an iteration that also holds its prompt,
and stays for as many iterations as it has output tokens. With B running requests of mean output
length o, an iteration therefore holds a Poisson number of prompts with mean B / o. Prompt lengths
are taken as exponential; their mean is inferred, not published (see `infer_server`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, nnls
from scipy.special import gammaln, roots_genlaguerre

from biscale_env.core.errors import BiscaleError
from biscale_env.models import physics
from biscale_env.models.fit.evidence import Serving, ServingPoint
from biscale_env.models.fit.profile_table import IterationWork
from biscale_env.models.iteration_model import as_record, effective_freq_ghz
from biscale_env.models.physics import Coefficients

Floats = NDArray[np.float64]
# prompts per iteration that are enumerated; the Poisson tail beyond is below 1e-4 at mean 1.8
MAX_PROMPTS = 8
NODES = (
    10  # quadrature nodes per prompt count: exact for polynomials of degree 19 in the prompt tokens
)
MS = 1e-3


@dataclass(frozen=True)
class Mixture:
    """Iterations of a server: their shares and their work."""

    share: Floats
    work: IterationWork


@dataclass(frozen=True)
class ColocatedServer:
    """What the serving points say about host time and prompts.

    Attributes:
        host0_s: host time per iteration, s.
        host_s_per_seq: host time per running request, s.
        prompt_tokens: mean prompt length.
        context_tokens: mean KV tokens per running request.
    """

    host0_s: float
    host_s_per_seq: float
    prompt_tokens: float
    context_tokens: float

    def apply(self, c: Coefficients) -> Coefficients:
        """Coefficients with this host time."""
        return c._replace(host0_s=self.host0_s, host_s_per_seq=self.host_s_per_seq)


def mixture(point: ServingPoint, prompt_tokens: float, context_tokens: float) -> Mixture:
    """Iterations of a server with ``point.batch`` running requests.

    The sum of N exponential prompts is Gamma distributed (Gauss-Laguerre nodes); given the sum T,
    the attention work ``sum l_i^2 / 2`` has the mean ``T^2 / (N + 1)``.
    """
    rate = point.batch / point.output_tokens
    shares, extra, attn = [np.exp([-rate])], [np.zeros(1)], [np.zeros(1)]
    for n in range(1, MAX_PROMPTS + 1):
        nodes, weights = roots_genlaguerre(NODES, n - 1)
        shares.append(np.exp(n * np.log(rate) - rate - gammaln(n + 1)) * weights / weights.sum())
        extra.append(prompt_tokens * nodes)
        attn.append((prompt_tokens * nodes) ** 2 / (n + 1))
    share, tokens = np.concatenate(shares), np.concatenate(extra)
    batch = np.full(tokens.shape, point.batch)
    work = IterationWork(batch + tokens, np.concatenate(attn), batch * context_tokens, batch)
    return Mixture(share / share.sum(), work)


def capped_clock_ghz(
    c: Coefficients, work: IterationWork, freq_ghz: float, freq_min_ghz: float
) -> Floats:
    """Effective clock of every iteration under the power cap, GHz."""
    out = np.empty(work.tokens.size)
    clock = np.full(out.shape, freq_ghz)
    effective_freq_ghz(as_record(c), *work.as_tuple(), clock, freq_min_ghz, out)
    return out


def median_s(c: Coefficients, mix: Mixture, freq_ghz: Floats | float) -> float:
    """Median interval over the iterations of a server, s."""
    time = physics.latency_s(c, *mix.work.as_tuple(), freq_ghz)
    order = np.argsort(time, kind="stable")
    return float(time[order][np.searchsorted(np.cumsum(mix.share[order]), 0.5)])


def mean_s(c: Coefficients, mix: Mixture, freq_ghz: Floats | float) -> float:
    """Mean interval over the iterations of a server, s."""
    return float(mix.share @ physics.latency_s(c, *mix.work.as_tuple(), freq_ghz))


def _fit_host(
    c: Coefficients, points: list[ServingPoint], freq_ghz: float, context: float, host0_s: float
) -> Floats:
    """Host time per iteration and per request from the median intervals.

    The former is held near ``host0_s``.
    """
    batch = np.array([p.batch for p in points])
    target = np.array([p.itl_p50_s for p in points])
    kernels = physics.latency_s(c, batch, 0.0, batch * context, 0.0, freq_ghz)
    near = 0.2 * host0_s
    rows = np.vstack(
        [
            np.column_stack([np.ones_like(batch), batch]) / (0.02 * target[:, None]),
            [[1.0 / near, 0.0]],
        ]
    )
    return nnls(rows, np.append((target - kernels) / (0.02 * target), host0_s / near))[0]


def _prompt_tokens(c: Coefficients, point: ServingPoint, freq_ghz: float, context: float) -> float:
    """Mean prompt length at which the mean interval exceeds pure decode as much as measured."""
    ratio = point.interval_s / point.itl_p50_s

    def excess(prompt: float) -> float:
        mix = mixture(point, prompt, context)
        time = physics.latency_s(c, *mix.work.as_tuple(), freq_ghz)
        return float(mix.share @ time / time[0]) - ratio

    if excess(1.0) > 0.0 or excess(1e4) < 0.0:
        raise BiscaleError(
            f"serving point with batch {point.batch:g}: mean and median interval do not fit any "
            "prompt length"
        )
    return float(brentq(excess, 1.0, 1e4, xtol=1e-6))


def infer_server(c: Coefficients, serving: Serving, host0_s: float) -> ColocatedServer:
    """Host time and prompt length from median and mean intervals of the measured points.

    Args:
        c: coefficients of the decode model, host time left out, ``attn_prefill_s`` filled in.
        serving: the measured points.
        host0_s: host time per iteration that is expected, s.
    """
    freq_ghz = serving.freq_mhz * MS
    points = [p for p in serving.points if p.fitted]
    kernels = c._replace(host0_s=0.0, host_s_per_seq=0.0)
    mean_output = float(np.mean([p.output_tokens for p in points]))
    prompt = 300.0
    for _ in range(30):
        context = prompt + serving.output_age_share * mean_output
        host = _fit_host(kernels, points, freq_ghz, context, host0_s)
        server = ColocatedServer(float(host[0]), float(host[1]), prompt, context)
        few = [p for p in points if p.batch <= serving.infer_prompt_up_to_batch]
        found = float(
            np.median([_prompt_tokens(server.apply(kernels), p, freq_ghz, context) for p in few])
        )
        if abs(found - prompt) < 1e-6 * prompt:
            break
        prompt = found
    return server
