"""A lower bound on the energy of a cluster, with the whole workload known.

Valid for every router, every policy and every actuation delay, as long as no more requests than
the SLO allows miss the TTFT bound, and no more the TPOT bound. What no policy can change:

* **Waiting.** Every GPU draws at least ``P0``: the least power of a waiting instance per GPU, or,
  where instances may be closed, that of a spare one if it is lower.
* **Prefill.** A batch of ``n`` new tokens, ``A`` token pairs and ``s`` requests needs above
  ``P0`` at least ``nu n + kappa A + sigma s``: for a clock and an ``n`` its energy and its
  duration are affine in ``A`` and ``s``, so the least of each coefficient over all clocks and sizes
  will do, also where the clock changes within the batch. A batch at the power cap takes longer than
  at the highest clock, at the power of the cap: one more row. Tokens, pairs and requests add up to
  the same sums however prompts are batched and cut into chunks.
* **Decode.** The fluid of :mod:`controllers.oracle.decode_bound`, with the instances together: its
  cuts hold for each of them, so they hold for the sums of busy time, tokens and cached tokens read.
  Nothing is known of when prefill hands a request over, except that it is after its arrival; and
  a request that meets both bounds has all its tokens at ``arrival + TTFT + TPOT (output - 1)``.

Energy is counted to the end of the workload, as in whole runs of a cluster: only what is due by
then is charged. Several workloads are bounded together, since the misses that the SLO allows may
all lie in one of them. What the bound loses: batches of any size at any time, every prompt at the
energy-optimal clock, attention of windowed layers in prefill.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import RequestTable
from biscale_env.envs.plant import Plant
from biscale_env.models.physics import iteration_energy_j, latency_s
from biscale_env.traces import Trace
from controllers.oracle.decode_bound import (
    SOLVER_TOLERANCE,
    WINDOW_S,
    arrival_curve,
    least_energy,
)
from controllers.oracle.decode_cuts import SAFETY, Iterations, find_cuts
from controllers.oracle.plan_replay import member_of

Floats = NDArray[np.float64]
ROUNDING_S = 1e-8  # more than `biscale_env.config.slo.within` forgives
MANY_PAIRS = 1e6  # so that rounding does not drown their energy


@dataclass(frozen=True)
class ClusterStage:
    """The instances of a phase.

    Attributes:
        plants: kinds of instances that there may be, e.g. one per tensor parallel degree.
        most: instances that may be busy at once; infinity where they come and go.
        floor_w: power that is drawn all the time, W.
        gpu_floor_w: the part of it of one GPU, W; energy of work counts above that.
    """

    plants: tuple[Plant, ...]
    most: float
    floor_w: float
    gpu_floor_w: float


def fixed_stage(plant: Plant, instances: int, member: int | None = None) -> ClusterStage:
    """Instances of one kind that are always there."""
    least_w = _least_w(plant, member)
    return ClusterStage((plant,), instances, instances * least_w, least_w / _gpus(plant))


def free_stages(
    plants: Mapping[str, Sequence[Plant]], gpus: int, spare_w: float, member: int | None = None
) -> dict[str, ClusterStage]:
    """Both phases of a cluster whose instances come and go.

    Args:
        plants: kinds of instances per phase.
        gpus: of the cluster.
        spare_w: power of a GPU outside all instances, W.
        member: ensemble member, None that of the plants.
    """
    kinds = [one for each in plants.values() for one in each]
    gpu_w = min(spare_w, *(_least_w(one, member) / _gpus(one) for one in kinds))
    return {
        phase: ClusterStage(tuple(each), np.inf, gpus * gpu_w * (phase == "prefill"), gpu_w)
        for phase, each in plants.items()
    }


def _least_w(plant: Plant, member: int | None) -> float:
    if plant.slo.classes or plant.settings.means == "cap":
        raise BiscaleError("the bound of a cluster knows neither SLO classes nor power caps")
    return plant.least_power_w(member_of(plant, member))


def _gpus(plant: Plant) -> int:
    return int(plant.model.member(-1).n_gpus)


class PrefillCost(NamedTuple):
    """What prefill costs at least above the floor, J."""

    per_token_j: float
    per_pair_j: float
    per_request_j: float


@dataclass(frozen=True)
class ClusterBound:
    """What no router and no policy can beat.

    Attributes:
        prefill_j: least energy of prefill up to the end of every workload, J; all of the floor,
            where instances come and go.
        decode_j: the same of decode.
        allowed: requests that may miss the TTFT bound, and that may miss the TPOT bound, all
            workloads together.
    """

    prefill_j: float
    decode_j: float
    allowed: int

    @property
    def energy_j(self) -> float:
        """Of both phases."""
        return self.prefill_j + self.decode_j


def prefill_cost(stage: ClusterStage, member: int | None = None) -> PrefillCost:
    """Least costs of prefill over all kinds of instances, clocks and batch sizes.

    Raises:
        BiscaleError: a decode plant.
    """
    each = [_cost_of(plant, stage.gpu_floor_w, member) for plant in stage.plants]
    return PrefillCost(*(min(column) for column in zip(*each, strict=True)))


def _cost_of(plant: Plant, gpu_floor_w: float, member: int | None) -> PrefillCost:
    if plant.phase != "prefill":
        raise BiscaleError(f"the prefill bound needs a prefill plant, got {plant.phase}")
    c = plant.model.member(member_of(plant, member))
    size = np.arange(1.0, plant.settings.instance.token_budget + 1.0)[:, None]
    clocks = (plant.clocks.grid_mhz / 1e3)[None, :]

    def above(pairs: float, requests: float) -> tuple[Floats, Floats]:
        """Energy above the floor at every size and clock, and at the cap, J."""
        time_s = latency_s(c, size, pairs, 0.0, requests, clocks)
        joules = iteration_energy_j(c, size, pairs, 0.0, requests, time_s, clocks)
        capped = (c.p_cap_w - gpu_floor_w) * time_s[:, -1]
        return c.n_gpus * (joules - gpu_floor_w * time_s), c.n_gpus * capped

    free, capped = above(0.0, 0.0)
    least = []
    for pairs, requests in ((MANY_PAIRS, 0.0), (0.0, 1.0)):
        more = above(pairs, requests)
        slopes = [float((m - b).min()) for m, b in zip(more, (free, capped), strict=True)]
        least.append(max(min(slopes) / max(pairs, requests), 0.0) * (1.0 - SAFETY))
    per_token = min(float((free / size).min()), float((capped / size[:, 0]).min()))
    windowed = c.window_share > 0.0  # its pairs are fewer than the prompt's length says
    return PrefillCost(
        max(per_token, 0.0) * (1.0 - SAFETY), 0.0 if windowed else least[0], least[1]
    )


def cluster_bound(
    stages: Mapping[str, ClusterStage],
    workloads: Sequence[Trace],
    attainment: float,
    member: int | None = None,
    window_s: float = WINDOW_S,
) -> ClusterBound:
    """Bound the energy of several workloads of a cluster from below.

    Args:
        stages: of ``prefill`` and ``decode``, see :func:`fixed_stage` and :func:`free_stages`.
        workloads: the requests; each is a run of its own, to its own end.
        attainment: fraction of all requests that must keep the TTFT bound, and that must keep the
            TPOT bound.
        member: ensemble member, None that of the plants.
        window_s: length of the windows of the fluid, s.

    Raises:
        BiscaleError: no request, or workloads with blocks: what a prefix cache finds depends on
            the router.
    """
    if not any(len(one) for one in workloads):
        raise BiscaleError("the bound of a cluster needs requests")
    if any(one.blocks is not None for one in workloads):
        raise BiscaleError("the bound of a cluster knows no prefix cache: give workloads without")
    allowed = int(np.floor((1.0 - attainment) * sum(len(one) for one in workloads) + 1e-9))
    prefill, decode = stages["prefill"], stages["decode"]
    ttft_s, whole_s = prefill.plants[0].slo.ttft_s, sum(one.duration_s for one in workloads)
    cost = prefill_cost(prefill, member)
    return ClusterBound(
        _prefill_j(cost, workloads, ttft_s, allowed) + prefill.floor_w * whole_s,
        _decode_j(decode, workloads, member, ttft_s, 2 * allowed, window_s)
        + decode.floor_w * whole_s,
        allowed,
    )


def _prefill_j(cost: PrefillCost, workloads: Sequence[Trace], ttft_s: float, late: int) -> float:
    """Energy above the floor of the prompts that are due by the end, less the dearest misses, J."""
    due = []
    for one in workloads:
        prompt = one.prompt_tokens[one.arrival_s + ttft_s <= one.duration_s].astype(np.float64)
        per_prompt = cost.per_token_j + 0.5 * cost.per_pair_j * prompt
        due.append(prompt * per_prompt + cost.per_request_j)
    each = np.sort(np.concatenate(due))
    return float(each[: max(len(each) - late, 0)].sum())


def _decode_j(
    stage: ClusterStage,
    workloads: Sequence[Trace],
    member: int | None,
    ttft_s: float,
    missed: int,
    window_s: float,
) -> float:
    """Energy above the floor of the tokens that are due by the end, all instances together, J."""
    workloads = [one for one in workloads if (one.output_tokens > 1).any()]
    if not workloads:
        return 0.0
    roomiest = max(stage.plants, key=lambda one: one.kv_capacity_tokens)
    pools = [RequestTable.of(roomiest, [one]) for one in workloads]
    extremes = _extremes(roomiest, pools)
    kinds = [
        Iterations(p, extremes, member_of(p, member), stage.gpu_floor_w * _gpus(p))
        for p in stage.plants
    ]
    shortest_s, tpot_s = min(kind.shortest_s for kind in kinds), stage.plants[0].slo.tpot_s
    amounts = [np.array(_amounts(pool)) for pool in pools]
    mean_context = sum(a[1].sum() for a in amounts) / sum(a[0].sum() for a in amounts)
    owed = [OwedWork(max(float(a[row].max()) for a in amounts)) for row in (0, 1)]
    borders_s, most, begin_s, before = [], [], 0.0, np.zeros((2, 1))
    for one, pool, amount in zip(workloads, pools, amounts, strict=True):
        inner = np.arange(window_s, one.duration_s - 1e-3 * window_s, window_s)
        own_s = np.append(inner, one.duration_s)
        most.append(before + arrival_curve(pool, own_s, shortest_s))
        before = most[-1][:, -1:]  # what is left over is lost, and so never more
        # what is late by rounding counts as in time
        due_s = pool.arrival_s + ttft_s + tpot_s * amount[0] + ROUNDING_S * (1.0 + amount[0])
        window = np.searchsorted(own_s, due_s)
        for work, row in zip(owed, amount, strict=True):
            work.add(row, window, len(own_s))
        borders_s.append(begin_s + own_s)
        begin_s += one.duration_s
    whole = np.concatenate(most, axis=1)
    least = np.minimum([work.curve(missed) for work in owed], whole)
    cuts, borders = _common_cuts(kinds, mean_context), np.concatenate(borders_s)
    # in windows and in the energy of one, so that the solver sees numbers of about one
    unit_j = float((cuts[:, 1:] @ whole[:, -1]).max()) / len(borders) or 1.0
    scaled = cuts * (window_s, 1.0, 1.0) / unit_j
    never = np.zeros(len(borders))
    above = least_energy(scaled, borders / window_s, whole, least, never, 0.0, False, stage.most)
    return above * unit_j * (1.0 - SOLVER_TOLERANCE)


def _amounts(pool: RequestTable) -> tuple[Floats, Floats]:
    """Tokens that decode makes of every request, and cached tokens that it reads for them."""
    tokens = pool.output.astype(np.float64) - 1.0
    return tokens, tokens * pool.prompt + 0.5 * tokens * (tokens + 1.0)


def _extremes(plant: Plant, pools: Sequence[RequestTable]) -> RequestTable:
    """The longest requests and the shortest prompt: between them lie all iterations."""
    prompt, output = (np.concatenate([getattr(p, n) for p in pools]) for n in ("prompt", "output"))
    longest = np.argsort(prompt + output)[-plant.settings.max_seqs :]
    chosen = np.append(longest, prompt.argmin())
    at_s = np.arange(float(len(chosen)))
    return RequestTable.of(plant, [Trace("extremes", at_s, prompt[chosen], output[chosen], "")])


def _summed(at: NDArray[np.int64], weights: Floats, size: int) -> Floats:
    return np.asarray(np.bincount(at, weights=weights, minlength=size), dtype=np.float64)


class OwedWork:
    """How much work is due by every border, less the largest misses, without keeping requests.

    Amounts are sorted into bins; a missed request is taken to have the most that its bin holds.
    """

    BINS: Final = 4096

    def __init__(self, most: float) -> None:
        """Make the bins.

        Args:
            most: largest amount there is.
        """
        self._edges = np.geomspace(1.0, max(most, 2.0), self.BINS)
        self._sums: list[Floats] = []
        self._counts: list[Floats] = []

    def add(self, amount: Floats, window: NDArray[np.int64], windows: int) -> None:
        """Take in the requests of a workload, and the windows by whose ends they are due.

        Args:
            amount: of each request.
            window: number of its window; ``windows`` or more: not due by the end.
            windows: of the workload.
        """
        due = window < windows
        at = window[due] * self.BINS + np.searchsorted(self._edges[:-1], amount[due])
        size, shape = windows * self.BINS, (windows, self.BINS)
        self._sums.append(_summed(at, amount[due], size).reshape(shape))
        self._counts.append(_summed(at, np.ones(len(at)), size).reshape(shape))

    def curve(self, missed: int) -> Floats:
        """Least that must be done by every border, if so many requests may miss it."""
        sums, counts = (
            np.cumsum(np.concatenate(each), axis=0) for each in (self._sums, self._counts)
        )
        above = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1] - counts  # requests in larger bins
        taken = np.clip(missed - above, 0.0, counts)
        lost = np.where(taken < counts, np.minimum(taken * self._edges, sums), sums)
        return np.asarray((sums - lost).sum(axis=1))


def _common_cuts(kinds: Sequence[Iterations], mean_context: float) -> Floats:
    """Cuts that hold for the iterations of every kind of instance."""
    found = np.concatenate([find_cuts(kind, mean_context) for kind in kinds])
    for kind in kinds:  # also where rounding has raised one
        found = np.array([kind.certify(cut) for cut in found])
    return np.unique(found, axis=0)
