"""`Cluster`: a running cluster.

Offer it requests piece by piece, let time pass, read records, change the placement on the way.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.config.cluster_layout import InstanceGroup, Placement
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.arrays import InstanceArrays, widen
from biscale_env.envs.cluster.cluster_settings import ClusterPlant
from biscale_env.models import COEFFICIENT_DTYPE
from biscale_env.sim.cluster.colocated import advance_colocated
from biscale_env.sim.cluster.layout import (
    CLUSTER_DTYPE,
    LOG_DTYPE,
    ClusterArrays,
    Decodes,
    OfferedWork,
    Prefills,
)
from biscale_env.sim.cluster.lifecycle import compact, open_decode, open_prefill, settle
from biscale_env.sim.cluster.loop import UNTIL, advance
from biscale_env.sim.prefix_cache import Blocks
from biscale_env.traces import Trace

PHASES = ("prefill", "decode")
NO_TIMES = np.zeros(0)
NO_BLOCKS = Blocks(np.zeros(0, np.int32), np.zeros(0, np.int64), 1)
NO_WORK = OfferedWork(np.zeros(0), np.zeros(0, np.int32), np.zeros(0, np.int32), 0, NO_BLOCKS)


@dataclass(frozen=True)
class Energies:
    """Energy since the beginning, J.

    Attributes:
        prefill_j: prefill instances, waiting included.
        decode_j: decode (or co-located) instances, waiting included.
        spare_j: GPUs outside the placement.
        prefill_idle_j: part of ``prefill_j`` that instances drew while they had nothing to run.
        decode_idle_j: the same part of ``decode_j``.
    """

    prefill_j: float
    decode_j: float
    spare_j: float
    prefill_idle_j: float = 0.0
    decode_idle_j: float = 0.0

    @property
    def total_j(self) -> float:
        """Sum of all GPUs of the cluster."""
        return self.prefill_j + self.decode_j + self.spare_j

    def since(self, earlier: "Energies") -> "Energies":
        """Difference to an earlier reading."""
        return Energies(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))

    @classmethod
    def sum_of(cls, parts: "Iterable[Energies]") -> "Energies":
        """Sum of several."""
        kept = list(parts)
        return cls(*(float(sum(getattr(e, f.name) for e in kept)) for f in fields(cls)))


class Cluster:
    """Instances of a placement, their queues, and what they have used so far.

    Memory depends on what is in the cluster at one time and on the largest piece of work, not on
    how long it runs.

    Attributes:
        plant: settings, loaded.
        placement: placement applied.
        time_s: time up to which everything has happened.
        log: finished requests of the latest call of :meth:`advance`, records of ``LOG_DTYPE``.
    """

    def __init__(self, plant: ClusterPlant, placement: Placement, seed: int = 0) -> None:
        """Bring a placement into service at time 0, every clock settled at its base.

        Args:
            plant: everything but the placement.
            placement: instances.
            seed: of the router's own random numbers.

        Raises:
            BiscaleError: the placement needs more GPUs than there are, or a model that does not
                exist.
        """
        self.plant, self.time_s, self.placement = plant, 0.0, placement
        self.state = np.zeros(1, dtype=CLUSTER_DTYPE)
        cluster = self.state[0]
        cluster["random"] = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        s = plant.settings
        cluster["router_prefill"], cluster["router_decode"] = (
            plant.router("prefill"),
            plant.router("decode"),
        )
        cluster["transfer_latency_s"], cluster["transfer_overlap"] = (
            s.transfer.latency_s,
            s.transfer.overlap,
        )
        first = plant.plant(placement.groups[0].phase, placement.groups[0].tp)
        cluster["kv_bytes_per_token"] = first.model.llm.kv_bytes_per_token(s.dtype)
        self.levels_ghz = np.array(first.clocks.levels_mhz) / 1e3
        self.spare_w = plant.spare_power_w(first)
        self.log = np.zeros(0, dtype=LOG_DTYPE)
        self._log_buffer = np.zeros(0, dtype=LOG_DTYPE)
        self._work = NO_WORK
        self._offered = 0
        self._arrays = {phase: InstanceArrays(phase, len(self.levels_ghz)) for phase in PHASES}
        self._rebuild()
        self.place(placement)

    # --- placement ---

    def place(self, placement: Placement) -> None:
        """Go over to a placement now.

        Instances of the same phase and TP stay, surplus ones drain, missing ones start.

        What stays gets the new base clock and weight. Surplus instances take no more requests,
        finish what they have and retire. Requests that wait in them stay there.

        Raises:
            BiscaleError: too many GPUs, or a change between disaggregated and co-located.
        """
        s = self.plant.settings
        if placement.gpus > s.gpus:
            raise BiscaleError(
                f"placement '{placement.name}' needs {placement.gpus} GPUs, but the cluster has "
                f"{s.gpus}"
            )
        if placement.colocated != self.placement.colocated:
            raise BiscaleError(
                "a cluster cannot change between disaggregated and co-located placements"
            )
        for phase in PHASES:
            self._place_phase(
                phase, placement.instances("colocated" if placement.colocated else phase)
            )
        self.placement = placement

    def _place_phase(self, phase: str, wanted: list[InstanceGroup]) -> None:
        if self.placement.colocated and phase == "prefill":
            return
        arrays = self._arrays[phase]
        meta, tps = arrays.meta, arrays.tps
        free: dict[int, list[int]] = {}
        for i in np.flatnonzero(meta["accepting"] == 1):
            free.setdefault(int(tps[i]), []).append(int(i))
        missing = []
        for group in wanted:
            if free.get(group.tp):
                chosen = int(free[group.tp].pop(0))
                meta["base_ghz"][chosen], meta["weight"][chosen] = (
                    group.freq_mhz / 1e3,
                    group.weight,
                )
            else:
                missing.append(group)
        surplus = [i for indices in free.values() for i in indices]
        meta["accepting"][surplus] = 0
        changed = {int(tps[i]) for i in surplus}
        for group in missing:
            cost = self.plant.settings.transitions
            wait = cost.reshard_s if changed else cost.cold_start_s
            self._start(phase, group, self.time_s + wait if self.time_s > 0 else 0.0)

    def _start(self, phase: str, group: InstanceGroup, ready_s: float) -> None:
        arrays = self._arrays[phase]
        i = arrays.add(group.tp)
        plant = self.plant.plant(group.phase, group.tp)
        plant.gpu.check_clock(group.freq_mhz)
        arrays.coefs[i] = np.array(
            tuple(plant.model.member(self.plant.settings.ensemble_member)), dtype=COEFFICIENT_DTYPE
        )
        arrays.params[i] = self.plant.params(group.phase, group.tp)
        record = arrays.meta[i]
        for name, value in self.plant.meta(group.phase, group.tp).items():
            record[name] = value
        record["base_ghz"], record["weight"] = group.freq_mhz / 1e3, group.weight
        record["accepting"], record["ready_s"] = 1, ready_s
        record["born_s"], record["retired_s"] = self.time_s, np.inf
        if phase == "decode":
            arrays.fit_slots(int(arrays.params[i]["max_seqs"]))
        self._rebuild()
        if phase == "prefill":
            open_prefill(self.prefills, i, self.time_s, group.freq_mhz / 1e3)
        else:
            open_decode(self.decodes, i, self.time_s, group.freq_mhz / 1e3, NO_TIMES)

    def _rebuild(self) -> None:
        """Make the groups that the kernels take; needed whenever an array was replaced."""
        self.prefills: Prefills = self._arrays["prefill"].prefills()
        self.decodes: Decodes = self._arrays["decode"].decodes()

    def _groups(self) -> ClusterArrays:
        """All groups of the event loops."""
        totals: Any = self.state[0]
        log: Any = self._log_buffer
        return ClusterArrays(
            totals, self.prefills, self.decodes, self._work, log, self.levels_ghz, NO_TIMES
        )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the groups, which share the arrays."""
        return {k: v for k, v in self.__dict__.items() if k not in ("prefills", "decodes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state and make the groups of its arrays."""
        self.__dict__.update(state)
        self._rebuild()

    # --- time ---

    def offer(self, trace: Trace, start_s: float | None = None) -> None:
        """Hand over requests to come; those of the previous piece must have arrived.

        Args:
            trace: requests, with times from ``start_s`` on.
            start_s: when the piece begins; now if not given.

        Raises:
            BiscaleError: requests that fit no instance, or a previous piece that has not arrived
                yet.
        """
        if self.state[0]["next"] < len(self._work.arrival_s):
            raise BiscaleError(
                "offer() before all requests of the previous piece have arrived: advance further "
                "first"
            )
        rooms = [int(a.params["kv_capacity"].min()) for a in self._arrays.values() if len(a.params)]
        trace.check_fits(min(rooms))
        compact(self._groups())
        arrival_s = trace.arrival_s + (self.time_s if start_s is None else start_s)
        blocks = self._blocks_of(trace)
        self._work = OfferedWork(
            arrival_s, trace.prompt_tokens, trace.output_tokens, self._offered, blocks
        )
        self._offered += len(trace)
        longest_queue = max(
            (int(a.states["end"].max()) for a in self._arrays.values() if len(a.states)), default=0
        )
        rows = widen(longest_queue + self.in_flight + len(trace) + 1)
        longest = int(trace.output_tokens.max()) if len(trace) else 1
        for arrays in self._arrays.values():
            arrays.fit_rows(rows)
        self._arrays["decode"].fit_wheel(longest)
        if len(self._log_buffer) < rows:
            self._log_buffer = np.zeros(rows, dtype=LOG_DTYPE)
        self._rebuild()

    def _blocks_of(self, trace: Trace) -> Blocks:
        """What prefix caches know of the requests to come, with room for it."""
        shared = trace.blocks
        if shared is None:
            return NO_BLOCKS
        prefill = self._arrays["prefill"]
        prefill.fit_blocks(shared.n_ids)
        if shared.n_ids + 1 > prefill.cache.tokens.shape[1]:  # nobody keeps prefixes
            return NO_BLOCKS
        return Blocks(shared.ids, shared.starts, shared.block_tokens)

    def advance(self, until_s: float = np.inf) -> int | None:
        """Let everything happen up to a time; infinity: until the last request is finished.

        Returns:
            None when the time is reached; with external policies, the number of the instance
            (prefill first) that waits for a decision (see :meth:`decide`), after which advance()
            has to be called again.
        """
        cluster = self.state[0]
        cluster["logged"] = 0
        waits = UNTIL
        if self.placement.colocated:
            advance_colocated(self._groups(), float(until_s))
        else:
            waits = int(advance(self._groups(), float(until_s)))
        self.log = self._log_buffer[: int(cluster["logged"])].copy()
        if waits != UNTIL:
            self.time_s = float(cluster["clock_s"])
            return waits
        self.time_s = self._last_event_s() if np.isinf(until_s) else float(until_s)
        settle(self.prefills, self.time_s, self._alive("prefill"))
        settle(self.decodes, self.time_s, self._alive("decode"))
        return None

    def _last_event_s(self) -> float:
        return max(float(self.state[0]["clock_s"]), self.time_s)

    def _alive(self, phase: str) -> NDArray[np.int64]:
        """Requests per instance that it still has to serve or keeps KV of."""
        states, meta = self._arrays[phase].states, self._arrays[phase].meta
        waiting = states["end"] - states["head"]
        return waiting + (
            meta["held_tokens"] if phase == "prefill" else states["batch"] + states["preempted"]
        )

    def decide(self, instance: int, freq_mhz: float) -> None:
        """Answer for an instance that waits, MHz."""
        n = len(self.prefills.meta)
        meta = self.prefills.meta if instance < n else self.decodes.meta
        meta[instance if instance < n else instance - n]["decided_ghz"] = freq_mhz / 1e3

    # --- books ---

    @property
    def in_flight(self) -> int:
        """Requests that have arrived and are not finished."""
        return int(self.state[0]["arrived"] - self.state[0]["finished"])

    def energies(self) -> Energies:
        """Energy per pool and of the spare GPUs since the beginning.

        A co-located pool counts as decode.
        """
        prefill, decode = (self._arrays[phase].total("energy_j") for phase in PHASES)
        idle = [self._arrays[phase].total("energy_idle_j") for phase in PHASES]
        used = sum(self.gpu_seconds(phase) for phase in PHASES)
        spare = max(self.plant.settings.gpus * self.time_s - used, 0.0)
        return Energies(prefill, decode, spare * self.spare_w, *idle)

    def gpu_seconds(self, phase: str) -> float:
        """GPU time that instances of a phase have been in service."""
        return self._arrays[phase].gpu_seconds(self.time_s)

    def counts(self) -> Counter[str]:
        """Requests by where they are.

        ``arrived``, ``finished``, ``queued`` (prefill), ``decoding``, and token books.
        """
        s, prefill, decode = self.state[0], self._arrays["prefill"], self._arrays["decode"]
        return Counter(
            arrived=int(s["arrived"]),
            finished=int(s["finished"]),
            queued=int(np.sum(prefill.states["end"] - prefill.states["head"])),
            decoding=int(self._alive("decode").sum()),
            held_tokens=int(prefill.meta["held_tokens"].sum()),
            load_tokens=int(prefill.meta["load_tokens"].sum() + decode.meta["load_tokens"].sum()),
            reserved_tokens=int(decode.meta["reserved_tokens"].sum()),
            cached_tokens=int(decode.states["cached"].sum()),
            prefill_batches=int(prefill.total("iterations")),
            stalls=int(s["stalls"]),
            preemptions=int(decode.total("preemptions")),
        )
