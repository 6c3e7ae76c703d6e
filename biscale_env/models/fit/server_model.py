"""Reading a server that holds prefill and decode.

Which iterations it runs, how long they take, how much prefill they hold, what power follows.

In such a server every request passes once through an iteration that also holds its prompt, and
stays for as many iterations as it has output tokens. With B running requests of mean output
length o, an iteration therefore holds a Poisson number of prompts with mean B / o. Prompt lengths
are taken as exponential.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import gammaln, roots_genlaguerre

from biscale_env.models import physics
from biscale_env.models.fit.gpu_evidence import ServingPoint
from biscale_env.models.fit.profile_table import IterationWork
from biscale_env.models.iteration_model import as_record, effective_freq_ghz
from biscale_env.models.physics import Coefficients

Floats = NDArray[np.float64]
# prompts per iteration that are enumerated; the Poisson tail beyond is below 2 % at mean 1
MAX_PROMPTS: Final = 3
NODES: Final = 4  # quadrature nodes per prompt count: exact for polynomials of degree 7
LONGEST_PROMPT: Final = 1e4


@dataclass(frozen=True)
class Mixture:
    """Iterations of a server: their shares and their work."""

    share: Floats
    work: IterationWork


def mixture(point: ServingPoint, prompt_tokens: float, context_tokens: float) -> Mixture:
    """Iterations of a server with ``point.batch`` running requests.

    The sum of N exponential prompts is Gamma distributed (Gauss-Laguerre nodes); given the sum T,
    the attention work ``sum l_i^2 / 2`` has the mean ``T^2 / (N + 1)``.

    Args:
        point: batch and output length.
        prompt_tokens: mean prompt length.
        context_tokens: mean KV tokens per running request.
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
    c: Coefficients, work: IterationWork, freq_ghz: float | Floats, freq_min_ghz: float
) -> Floats:
    """Effective clock of every iteration under the power cap, GHz."""
    out = np.empty(work.tokens.size)
    clock = np.broadcast_to(np.asarray(freq_ghz, dtype=np.float64), out.shape).copy()
    effective_freq_ghz(as_record(c), *work.as_tuple(), clock, freq_min_ghz, out)
    return out


@dataclass(frozen=True)
class ServerPrediction:
    """What the formula says about one serving point.

    Attributes:
        itl_p50_s: median interval over the iterations, s.
        interval_s: mean interval, s.
        power_w: mean power per GPU, W.
    """

    itl_p50_s: float
    interval_s: float
    power_w: float


def predict_server(
    c: Coefficients, mix: Mixture, freq_ghz: float, freq_min_ghz: float
) -> ServerPrediction:
    """Median and mean interval and mean power of a server at a requested clock."""
    f = capped_clock_ghz(c, mix.work, freq_ghz, freq_min_ghz)
    w = mix.work
    time = np.asarray(physics.latency_s(c, *w.as_tuple(), f))
    joule = physics.iteration_energy_j(c, *w.as_tuple(), time, f)
    mean = float(mix.share @ time)
    order = np.argsort(time, kind="stable")
    half = min(int(np.searchsorted(np.cumsum(mix.share[order]), 0.5)), time.size - 1)
    return ServerPrediction(float(time[order][half]), mean, float(mix.share @ joule) / mean)


def prompt_tokens_of(
    c: Coefficients, point: ServingPoint, freq_ghz: float, context: float, freq_min_ghz: float
) -> float | None:
    """Mean prompt length at which the mean interval exceeds pure decode as much as measured.

    None where no length does: mean below median, or more than the longest prompt.
    """
    ratio = point.interval_s / point.itl_p50_s

    def excess(prompt: float) -> float:
        found = predict_server(c, mixture(point, prompt, context), freq_ghz, freq_min_ghz)
        return found.interval_s / found.itl_p50_s - ratio

    if excess(1.0) > 0.0 or excess(LONGEST_PROMPT) < 0.0:
        return None
    return float(brentq(excess, 1.0, LONGEST_PROMPT, rtol=1e-3))
