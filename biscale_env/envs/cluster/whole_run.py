"""Whole runs of a cluster over a trace, static or with policies, and what came of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_env.config import Slo
from biscale_env.config.cluster_layout import Placement
from biscale_env.config.slo import within
from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_settings import ClusterPlant
from biscale_env.envs.cluster.engine import Cluster, Energies
from biscale_env.envs.cluster.instance_observer import ClusterObserver
from biscale_env.sim.cluster.layout import LOG_DTYPE
from biscale_env.traces import Trace


@dataclass(frozen=True)
class ClusterRun:
    """Result of a run.

    Energy and tokens are counted up to the end of the trace, latencies to the last token of every
    request: what is still in flight at the end would otherwise be free for slow policies and the
    idle tail a charge on everybody.

    Attributes:
        requests: every request, in order of arrival; records of ``LOG_DTYPE``.
        energy: energy up to the end of the trace.
        duration_s: length of the trace.
        produced_tokens: output tokens made up to then.
        prefilled_tokens: output tokens asked for by the requests whose prompt was done by then.
        prefill_batches: batches that prefill ran, 0 for co-located servers.
        stalls: prefill batches that waited for decode.
        preemptions: decode preemptions.
        slo: the objective.
    """

    requests: NDArray[np.void]
    energy: Energies
    duration_s: float
    produced_tokens: int
    prefilled_tokens: int
    prefill_batches: int
    stalls: int
    preemptions: int
    slo: Slo

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """Time to first token per request, s."""
        return np.asarray(self.requests["first_token_s"] - self.requests["arrival_s"])

    @property
    def tpot_s(self) -> NDArray[np.float64]:
        """Time per output token of the requests that have at least two, s."""
        r = self.requests[self.requests["output_tokens"] > 1]
        return np.asarray((r["finish_s"] - r["first_token_s"]) / (r["output_tokens"] - 1))

    def attainment(self, phase: str) -> float:
        """Fraction of requests within the bound of a phase; 1 without requests."""
        latency = self.ttft_s if phase == "prefill" else self.tpot_s
        return self.slo.attained(latency, phase)

    @property
    def meets_slo(self) -> bool:
        """Whether the SLO is met, by its own statistic."""
        if self.slo.statistic == "each":
            return min(self.attainment("prefill"), self.attainment("decode")) >= self.slo.attainment
        r = self.requests
        intervals = np.maximum(r["output_tokens"] - 1, 1)
        tpot_met = within((r["finish_s"] - r["first_token_s"]) / intervals, self.slo.tpot_s)
        both = tpot_met & within(self.ttft_s, self.slo.ttft_s)
        return bool(np.mean(both) >= self.slo.attainment) if both.size else True

    def row(self) -> dict[str, float]:
        """Flat metrics of the run; energies per output token in J."""
        ttft, tpot = (
            np.quantile(v, [0.5, 0.99]) if v.size else [0.0, 0.0]
            for v in (self.ttft_s, self.tpot_s)
        )
        produced = max(self.produced_tokens, 1)
        e = self.energy
        return {
            "prefill_j_per_token": e.prefill_j / max(self.prefilled_tokens, 1),
            "decode_j_per_token": e.decode_j / produced,
            "spare_j_per_token": e.spare_j / produced,
            "prefill_busy_j_per_token": (e.prefill_j - e.prefill_idle_j)
            / max(self.prefilled_tokens, 1),
            "decode_busy_j_per_token": (e.decode_j - e.decode_idle_j) / produced,
            "total_j_per_token": e.total_j / produced,
            "mean_power_w": e.total_j / self.duration_s,
            "ttft_p50_s": float(ttft[0]),
            "ttft_p99_s": float(ttft[1]),
            "tpot_p50_s": float(tpot[0]),
            "tpot_p99_s": float(tpot[1]),
            "attainment_ttft": self.attainment("prefill"),
            "attainment_tpot": self.attainment("decode"),
            "meets_slo": float(self.meets_slo),
            "requests": float(len(self.requests)),
            "requests_per_prefill_batch": len(self.requests) / max(self.prefill_batches, 1),
            "produced_tokens": float(self.produced_tokens),
            "stalls": float(self.stalls),
            "preemptions": float(self.preemptions),
        }


def advance_with(
    cluster: Cluster,
    observer: ClusterObserver | None,
    policies: Mapping[str, Policy],
    until_s: float = np.inf,
) -> list[NDArray[np.void]]:
    """Advance to a time, asking external policies before every iteration.

    Returns:
        The logs of all calls.
    """
    logs = []
    while True:
        waiting = cluster.advance(until_s)
        logs.append(cluster.log)
        if waiting is None:
            return logs
        if observer is None:
            raise BiscaleError("an external policy was configured but none was given")
        phase, observation = observer.observe(waiting)
        action, _ = policies[phase].predict(observation)
        cluster.decide(waiting, observer.freq_mhz(phase, float(np.ravel(action)[0])))


def advance_at_intervals(
    cluster: Cluster,
    observer: ClusterObserver,
    policies: Mapping[str, Policy],
    interval_s: float,
    until_s: float = np.inf,
) -> list[NDArray[np.void]]:
    """Advance to a time; every ``interval_s`` all instances of the static rule choose a clock.

    The decisions of the many-agent environment, where a phase without a policy keeps its clocks.

    Args:
        cluster: the cluster, without instances that drain.
        observer: of the cluster.
        policies: per phase.
        interval_s: time between decisions, s.
        until_s: when to stop, s; infinity: when every request is finished.

    Returns:
        The logs of all calls.
    """
    logs: list[NDArray[np.void]] = []
    whole = np.isinf(until_s)
    while cluster.in_flight > 0 if whole else cluster.time_s < until_s:
        for phase, policy in policies.items():
            actions, _ = policy.predict(observer.observe_phase(phase))
            observer.act(phase, np.ravel(actions))
        cluster.advance(min(cluster.time_s + interval_s, until_s))
        logs.append(cluster.log)
    return logs or [np.zeros(0, dtype=LOG_DTYPE)]


Planner = Callable[[int, Trace | None], Placement]


@dataclass(frozen=True)
class Window:
    """What happened in one window of a run.

    Attributes:
        index: number of the window; -1: the time after the last window, until every request is
            finished.
        placement: placement applied.
        finished: requests that ended in it, records of ``LOG_DTYPE``.
        energy: energy of the window.
        arrived: requests that arrived in it.
        produced_tokens: output tokens made in it.
        prefilled_tokens: output tokens asked for by requests whose prompt was done in it.
        duration_s: its length.
    """

    index: int
    placement: Placement
    finished: NDArray[np.void]
    energy: Energies
    arrived: int
    produced_tokens: int
    prefilled_tokens: int
    duration_s: float

    def missed(self, ttft_s: float, tpot_s: float) -> tuple[int, int]:
        """Finished requests beyond a TTFT bound, and beyond a TPOT bound, s."""
        r = self.finished
        intervals = r["output_tokens"] - 1
        late = ~within(r["first_token_s"] - r["arrival_s"], ttft_s)
        slow = ~within(r["finish_s"] - r["first_token_s"], tpot_s * intervals) & (intervals > 0)
        return int(late.sum()), int(slow.sum())


class WindowedRun:
    """A cluster that is run window by window, under a coarse loop.

    Attributes:
        cluster: the cluster.
        policies: per phase, the policy asked where the settings say ``external``, or at intervals.
    """

    def __init__(
        self,
        plant: ClusterPlant,
        placement: Placement,
        seed: int = 0,
        policies: Mapping[str, Policy] | None = None,
        interval_s: float | None = None,
    ) -> None:
        """Bring the first placement into service.

        Args:
            plant: everything but the placement.
            placement: of the first window.
            seed: of the router.
            policies: per phase, the policy asked where the settings say ``external``. Only
                stateless policies: every instance is asked with a single observation.
            interval_s: time between decisions, s, of all instances at once, under the static rule;
                None: before every iteration, under ``external``.
        """
        self.policies, self._interval_s = policies or {}, interval_s
        self.cluster = Cluster(plant, placement, seed)
        self._observer = ClusterObserver(self.cluster) if policies else None
        self._read = (self.cluster.energies(), 0, 0)

    def window(self, index: int, piece: Trace) -> Window:
        """Run one window: the requests of a piece of a trace, from now on.

        The window is as long as the piece, and includes its last arrival.
        """
        start_s = self.cluster.time_s
        self.cluster.offer(piece)
        end_s = start_s + piece.duration_s
        if len(piece):
            end_s = max(end_s, np.nextafter(start_s + float(piece.arrival_s[-1]), np.inf))
        return self._advance(index, end_s, len(piece))

    def rest(self) -> Window:
        """The time until every request is finished."""
        return self._advance(-1, np.inf, 0)

    def over(self, pieces: Iterable[Trace], planner: Planner) -> Iterator[Window]:
        """Run window by window over pieces of a trace, which may be a stream.

        The last item is the time after them.

        Args:
            pieces: the windows.
            planner: gives the placement of every window but the first: called with the number of
                the window and the requests of the window before.
        """
        before: Trace | None = None
        for k, piece in enumerate(pieces):
            if k:
                self.cluster.place(planner(k, before))
            yield self.window(k, piece)
            before = piece
        yield self.rest()

    def _advance(self, index: int, until_s: float, arrived: int) -> Window:
        start_s, cluster = self.cluster.time_s, self.cluster
        if self._interval_s is None or self._observer is None:
            logs = advance_with(cluster, self._observer, self.policies, until_s)
        else:
            logs = advance_at_intervals(
                cluster, self._observer, self.policies, self._interval_s, until_s
            )
        state, before = cluster.state[0], self._read
        made, prompts = int(state["produced_tokens"]), int(state["prefilled_tokens"])
        self._read = (cluster.energies(), made, prompts)
        return Window(
            index,
            cluster.placement,
            np.concatenate(logs),
            self._read[0].since(before[0]),
            arrived,
            made - before[1],
            prompts - before[2],
            cluster.time_s - start_s,
        )


def cut(trace: Trace, window_s: float) -> Iterator[Trace]:
    """Successive windows of a trace; the last is as long as what is left."""
    start_s = 0.0
    while start_s < trace.duration_s or start_s == 0.0:
        yield trace.window(start_s, start_s + window_s) if window_s < trace.duration_s else trace
        start_s += window_s


def run_windows(
    plant: ClusterPlant,
    planner: Planner,
    trace: Trace,
    window_s: float = np.inf,
    seed: int = 0,
    policies: Mapping[str, Policy] | None = None,
    interval_s: float | None = None,
) -> tuple[ClusterRun, list[Window]]:
    """Run a coarse loop over a trace to the last token.

    Args:
        plant: everything but the placement.
        planner: called with the number of a window and the requests of the window before (None at
            first).
        trace: the requests.
        window_s: length of a window, s.
        seed: of the router.
        policies: per phase, the policy asked where the settings say ``external``.
        interval_s: as of :class:`WindowedRun`.

    Raises:
        BiscaleError: an empty trace, or a placement that does not fit.
    """
    if len(trace) == 0:
        raise BiscaleError(f"{trace.name} has no requests: a cluster run needs at least one")
    loop = WindowedRun(plant, planner(0, None), seed, policies, interval_s)
    windows = list(loop.over(cut(trace, window_s), planner))
    requests = np.concatenate([w.finished for w in windows])
    inside = [w for w in windows if w.index >= 0]
    energy = Energies.sum_of(w.energy for w in inside)
    counts = loop.cluster.counts()
    run = ClusterRun(
        requests[np.argsort(requests["request"], kind="stable")],
        energy,
        trace.duration_s,
        sum(w.produced_tokens for w in inside),
        sum(w.prefilled_tokens for w in inside),
        counts["prefill_batches"],
        counts["stalls"],
        counts["preemptions"],
        plant.slo,
    )
    return run, windows


def run_cluster(
    plant: ClusterPlant,
    placement: Placement,
    trace: Trace,
    seed: int = 0,
    policies: Mapping[str, Policy] | None = None,
    interval_s: float | None = None,
) -> ClusterRun:
    """Run one placement over a trace to the last token; arguments as for :func:`run_windows`.

    Raises:
        BiscaleError: an empty trace, or a placement that does not fit.
    """
    return run_windows(
        plant,
        lambda k, before: placement,
        trace,
        seed=seed,
        policies=policies,
        interval_s=interval_s,
    )[0]


def cluster_capacity(
    plant: ClusterPlant,
    placement: Placement,
    trace: Trace,
    seeds: Sequence[int] = (0,),
    tolerance: float = 0.02,
) -> float:
    """Highest load that a placement serves within the SLO, requests/s.

    Bisection on chosen requests; 0 when there is none.
    """

    def meets(rate_rps: float) -> bool:
        return all(
            run_cluster(plant, placement, trace.scaled_to(rate_rps, seed), seed).meets_slo
            for seed in seeds
        )

    low, high = 0.0, trace.rate_rps
    while high <= 256 * trace.rate_rps and meets(high):
        low, high = high, 2.0 * high
    while high - low > tolerance * high and high > trace.rate_rps / 64:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low
