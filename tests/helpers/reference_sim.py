"""A slow simulator in plain Python, written from the description alone.

Explicit lists of requests, no rings, trees or records.

It shares nothing with the compiled one but the formula of an iteration (``models.physics``), whose
cap it finds by bisection of its own.
"""

import math
from dataclasses import dataclass, field

from biscale_env.models import physics
from biscale_env.models.physics import Coefficients

RATE_WINDOWS_S = (1.0, 10.0, 60.0)
NO_DEADLINE = 10.0
HORIZON = 8
MOST_CLASSES = 8


@dataclass
class Settings:
    """Engine parameters; the fields of the compiled parameter record."""

    token_budget: int = 2048
    max_seqs: int = 256
    kv_capacity: int = 400_000
    kv_watermark: float = 0.01
    delay_s: float = 0.05
    min_interval_s: float = 0.0
    freq_min_ghz: float = 0.51
    freq_max_ghz: float = 1.98
    freq_step_ghz: float = 0.015
    slo_s: float = 0.6
    end_s: float = 10.0
    drain: int = 0
    energy_ref_j: float = 100.0
    violation_weight: float = 30.0
    parked: int = 0
    parked_w: float = 0.0
    parked_ramp_s: float = 0.0
    classes: int = 0  # SLO classes of requests
    class_scale: tuple[float, ...] = (1.0,) * MOST_CLASSES
    class_weight: tuple[float, ...] = (1.0,) * MOST_CLASSES


@dataclass
class Request:
    """One request and what became of it."""

    number: int
    arrival_s: float
    prompt: int
    output: int
    slo_class: int = 0
    done: int = 0  # prompt tokens computed (prefill) or output tokens it has (decode)
    start_s: float = math.nan
    finish_s: float = math.nan


@dataclass
class Work:
    """One engine iteration."""

    tokens: int
    attn: float
    cached: int
    n_seq: int


def clock_under_cap(c: Coefficients, work: Work, freq_ghz: float, lowest_ghz: float) -> float:
    """Highest clock up to the request whose mean power is within the cap, by bisection."""

    def above(f: float) -> bool:
        return physics.power_w(c, work.tokens, work.attn, work.cached, work.n_seq, f) > c.p_cap_w

    if not above(freq_ghz):
        return freq_ghz
    if above(lowest_ghz):
        return lowest_ghz
    low, high = lowest_ghz, freq_ghz
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return low


@dataclass
class Actuator:
    """A clock that follows requests after a delay.

    One is under way, only the newest waits behind it.
    """

    delay_s: float
    applied: float
    newest: float = 0.0
    flight: tuple[float, float] | None = None
    switches: int = 0

    def __post_init__(self) -> None:
        self.newest = self.applied

    def ask(self, now_s: float, freq_ghz: float) -> None:
        if freq_ghz == self.newest:
            return
        self.newest = freq_ghz
        if self.delay_s == 0:
            self.applied = freq_ghz
            self.switches += 1
        elif self.flight is None:
            self.flight = (freq_ghz, now_s + self.delay_s)

    @property
    def next_s(self) -> float:
        return self.flight[1] if self.flight else math.inf

    def take_effect(self) -> None:
        assert self.flight is not None
        self.applied, at_s = self.flight
        self.switches += 1
        self.flight = (self.newest, at_s + self.delay_s) if self.newest != self.applied else None

    def remaining_s(self, now_s: float) -> float:
        """Until the newest request is in effect."""
        if self.flight is None:
            return 0.0
        target, at_s = self.flight
        return at_s - now_s + (0.0 if target == self.newest else self.delay_s)


@dataclass
class Segment:
    """A stretch of constant power."""

    start_s: float
    end_s: float
    power_w: float  # whole instance
    freq_ghz: float
    busy: bool


@dataclass
class Instance:
    """What both phases share."""

    c: Coefficients
    p: Settings
    todo: list[Request]
    now_s: float = 0.0
    over: bool = False
    queue: list[Request] = field(default_factory=list)
    arrived: list[Request] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    iterations: int = 0
    finished: list[Request] = field(default_factory=list)
    violations: int = 0
    last_time_s: float = 0.0
    last_power_w: float = 0.0
    step_segments: list[Segment] = field(default_factory=list)
    step_violations: int = 0
    step_finished: int = 0
    awake_s: float = 0.0  # a parked instance that got work runs at the lowest clock until then

    def __post_init__(self) -> None:
        self.clock = Actuator(self.p.delay_s, self.p.freq_max_ghz)
        self.todo = sorted(self.todo, key=lambda r: r.number)
        self.wait()

    # what a phase defines
    def has_work(self) -> bool:
        raise NotImplementedError

    def admit(self) -> None:
        raise NotImplementedError

    def iterate(self) -> None:
        raise NotImplementedError

    # time
    def spend(self, until_s: float, power_w: float, freq_ghz: float, busy: bool) -> None:
        segment = Segment(self.now_s, until_s, power_w * self.c.n_gpus, freq_ghz, busy)
        self.segments.append(segment)
        self.step_segments.append(segment)
        self.now_s = until_s

    @property
    def pace_ghz(self) -> float:
        """Clock that work runs at now."""
        return self.clock.applied if self.now_s >= self.awake_s else self.p.freq_min_ghz

    def run(self, work: Work) -> None:
        """One iteration: progress accrues at the rate of the clock in effect."""
        begin_s, progress, energy_j = self.now_s, 0.0, 0.0
        while True:
            f = clock_under_cap(self.c, work, self.pace_ghz, self.p.freq_min_ghz)
            whole_s = physics.latency_s(self.c, work.tokens, work.attn, work.cached, work.n_seq, f)
            power = physics.power_w(self.c, work.tokens, work.attn, work.cached, work.n_seq, f)
            end_s = self.now_s + (1.0 - progress) * whole_s
            landing_s = self.clock.next_s
            if self.now_s < self.awake_s:
                landing_s = min(landing_s, self.awake_s)
            if landing_s >= end_s:
                energy_j += power * (end_s - self.now_s)
                self.spend(end_s, power, f, True)
                break
            progress += (landing_s - self.now_s) / whole_s
            energy_j += power * (landing_s - self.now_s)
            self.spend(landing_s, power, f, True)
            if self.clock.next_s <= landing_s:
                self.clock.take_effect()
        self.iterations += 1
        self.last_time_s = self.now_s - begin_s
        self.last_power_w = energy_j / self.last_time_s

    def idle(self, until_s: float) -> None:
        if self.p.parked and until_s > self.now_s:
            self.awake_s = until_s + self.p.parked_ramp_s
        while self.clock.next_s < until_s:
            f = self.clock.applied
            self.spend(self.clock.next_s, self.waiting_w(f), f, False)
            self.clock.take_effect()
        f = self.clock.applied
        self.spend(until_s, self.waiting_w(f), f, False)

    def waiting_w(self, freq_ghz: float) -> float:
        return self.p.parked_w if self.p.parked else physics.idle_power_w(self.c, freq_ghz)

    def take_arrivals(self) -> None:
        while self.todo and self.todo[0].arrival_s <= self.now_s:
            self.queue.append(self.todo[0])
            self.arrived.append(self.todo.pop(0))

    def wait(self) -> None:
        """Until there is work or the episode is over."""
        self.take_arrivals()
        self.admit()
        if self.has_work():
            self.over = self.now_s >= self.p.end_s and not self.p.drain
        elif self.todo and (self.todo[0].arrival_s <= self.p.end_s or self.p.drain):
            self.idle(self.todo[0].arrival_s)
            self.take_arrivals()
            self.admit()
        else:
            if self.now_s < self.p.end_s:
                self.idle(self.p.end_s)
            self.over = True

    def step(self, freq_ghz: float) -> None:
        """One decision."""
        self.step_segments, self.step_violations, self.step_finished = [], 0, 0
        self.step_missed = 0.0
        p = self.p
        grid = [
            p.freq_max_ghz - k * p.freq_step_ghz
            for k in range(round((p.freq_max_ghz - p.freq_min_ghz) / p.freq_step_ghz) + 1)
        ]
        self.clock.ask(self.now_s, min(grid, key=lambda f: abs(f - freq_ghz)))
        until_s = self.now_s + p.min_interval_s
        while True:
            self.iterate()
            self.wait()
            if self.over or self.now_s >= until_s:
                return

    def bound_s(self, request: Request) -> float:
        """Bound of a request: the SLO's, or that of its class."""
        return self.p.slo_s * (self.p.class_scale[request.slo_class] if self.p.classes else 1.0)

    def finish(self, request: Request, late: bool) -> None:
        request.finish_s = self.now_s
        self.finished.append(request)
        self.step_finished += 1
        self.step_violations += late
        weight = self.p.class_weight[request.slo_class] if self.p.classes else 1.0
        self.step_missed += weight * late
        self.violations += late

    # sums
    @property
    def energy_j(self) -> float:
        return math.fsum(s.power_w * (s.end_s - s.start_s) for s in self.segments)

    @property
    def step_energy_j(self) -> float:
        return math.fsum(s.power_w * (s.end_s - s.start_s) for s in self.step_segments)

    @property
    def step_idle_j(self) -> float:
        return math.fsum(
            s.power_w * (s.end_s - s.start_s) for s in self.step_segments if not s.busy
        )

    @property
    def step_freq_ghz(self) -> float:
        busy = [s for s in self.step_segments if s.busy]
        return sum(s.freq_ghz * (s.end_s - s.start_s) for s in busy) / sum(
            s.end_s - s.start_s for s in busy
        )

    @property
    def reward(self) -> float:
        return (
            -self.step_energy_j / self.p.energy_ref_j - self.p.violation_weight * self.step_missed
        )

    def common_observation(self) -> dict[str, float]:
        seen: dict[str, float] = {}

        def mean_rate(window_s: float, weight: str | None) -> float:
            total = sum(
                math.exp(-(self.now_s - r.arrival_s) / window_s) * (r.prompt if weight else 1)
                for r in self.arrived
            )
            return total / window_s / (1 - math.exp(-max(self.now_s, 1.0) / window_s))

        for w in RATE_WINDOWS_S:
            seen[f"arrival_rate_{w:g}s"] = mean_rate(w, None)
        seen["token_rate_10s"] = mean_rate(10.0, "prompt")
        seen["freq_current"] = self.pace_ghz * 1e3
        seen["freq_pending"] = self.clock.newest * 1e3
        ramp_s = max(self.awake_s - self.now_s, 0.0)
        seen["time_to_apply"] = max(self.clock.remaining_s(self.now_s), ramp_s)
        seen["actuation_delay"] = self.p.delay_s
        seen["last_time"] = self.last_time_s
        seen["last_power"] = self.last_power_w
        seen["slo"] = self.p.slo_s
        return seen


@dataclass
class PrefillInstance(Instance):
    """First come, first served batches under a token budget; long prompts in chunks."""

    def has_work(self) -> bool:
        return bool(self.queue)

    def admit(self) -> None:
        """Nothing holds a request back."""

    def plan(self, n_batches: int) -> list[list[tuple[Request, int, int]]]:
        """The next batches as lists of (request, tokens before it, tokens of it)."""
        left = [[r, r.done] for r in self.queue]
        batches = []
        for _ in range(n_batches):
            batch, room = [], self.p.token_budget
            while left and room > 0 and len(batch) < self.p.max_seqs:
                request, before = left[0]
                take = min(request.prompt - before, room)
                batch.append((request, before, take))
                room -= take
                left[0][1] += take
                if left[0][1] == request.prompt:
                    left.pop(0)
            batches.append(batch)
        return batches

    @staticmethod
    def work_of(batch: list[tuple[Request, int, int]]) -> Work:
        return Work(
            sum(take for _, _, take in batch),
            sum(take * (take / 2 + before) for _, before, take in batch),
            0,
            len(batch),
        )

    def iterate(self) -> None:
        (batch,) = self.plan(1)
        self.run(self.work_of(batch))
        for request, before, take in batch:
            request.done = before + take
            if request.done == request.prompt:
                self.queue.remove(request)
                self.finish(request, self.now_s - request.arrival_s > self.bound_s(request))

    def observation(self) -> dict[str, float]:
        seen = self.common_observation()
        complete = 0
        for k, batch in enumerate(self.plan(HORIZON)):
            work = self.work_of(batch)
            ends = [r for r, before, take in batch if before + take == r.prompt]
            slacks = [(r.arrival_s + self.bound_s(r) - self.now_s) / self.p.slo_s for r in ends]
            complete += len(ends)
            seen[f"batch_tokens_{k}"] = work.tokens
            seen[f"batch_attn_{k}"] = work.attn
            seen[f"batch_requests_{k}"] = work.n_seq
            seen[f"batch_completing_{k}"] = len(ends)
            seen[f"batch_slack_{k}"] = min([*slacks, NO_DEADLINE])
            seen[f"batch_slack_alive_{k}"] = min([*(s for s in slacks if s > 0), NO_DEADLINE])
        seen["queue_requests"] = len(self.queue)
        seen["queue_tokens"] = sum(r.prompt - r.done for r in self.queue)
        # a wider bound is as good as a later arrival
        waits = [
            (self.now_s - r.arrival_s - (self.bound_s(r) - self.p.slo_s)) / self.p.slo_s
            for r in self.queue[: complete + 1]
        ]
        seen["oldest_wait"] = max(waits, default=0.0)
        seen["kv_backpressure"] = 0.0
        return seen


@dataclass
class DecodeInstance(Instance):
    """Continuous batching: a request joins when there is room, the newest is thrown out when there
    is none.
    """

    running: list[Request] = field(default_factory=list)  # oldest admission first
    thrown_out: list[Request] = field(default_factory=list)  # the next to come back last
    rebuild: list[int] = field(default_factory=list)  # KV tokens to recompute in the next iteration
    preemptions: int = 0
    kv_peak: int = 0

    @property
    def cached(self) -> int:
        return sum(r.prompt + r.done for r in self.running)

    def has_work(self) -> bool:
        return bool(self.running)

    def admit(self) -> None:
        room = self.p.kv_capacity * (1.0 - self.p.kv_watermark)
        while len(self.running) < self.p.max_seqs and (self.thrown_out or self.queue):
            back = bool(self.thrown_out)
            request = self.thrown_out[-1] if back else self.queue[0]
            kv = request.prompt + (request.done if back else 1)
            if self.running and self.cached + kv + len(self.running) + 1 > room:
                break
            if back:
                self.thrown_out.pop()
                self.rebuild.append(kv)
            else:
                self.queue.pop(0)
                request.done = 1
                request.start_s = self.now_s
            self.running.append(request)
        while len(self.running) > 1 and self.cached + len(self.running) > self.p.kv_capacity:
            self.thrown_out.append(self.running.pop())
            self.preemptions += 1
        self.kv_peak = max(self.kv_peak, self.cached)

    def iterate(self) -> None:
        work = Work(
            len(self.running) + sum(self.rebuild),
            sum(n * n / 2 for n in self.rebuild),
            self.cached,
            len(self.running),
        )
        self.rebuild = []
        self.run(work)
        for request in list(self.running):
            request.done += 1
        self.kv_peak = max(self.kv_peak, self.cached)
        for request in list(self.running):
            if request.done == request.output:
                self.running.remove(request)
                elapsed_s = self.now_s - request.arrival_s
                self.finish(request, elapsed_s > self.bound_s(request) * (request.output - 1))

    def observation(self) -> dict[str, float]:
        seen = self.common_observation()
        waiting = [(r, 1) for r in self.queue] + [(r, r.done) for r in self.thrown_out]
        unit_s = min([self.bound_s(r) for r in self.running], default=self.p.slo_s)
        slacks = [
            (self.bound_s(r) * (r.done - 1) - (self.now_s - r.arrival_s)) / unit_s
            for r in self.running
        ]
        seen["slo"] = unit_s
        seen["batch"] = len(self.running)
        seen["cached_tokens"] = self.cached
        seen["kv_use"] = self.cached / self.p.kv_capacity
        seen["recompute_tokens"] = sum(self.rebuild)
        seen["waiting_requests"] = len(waiting)
        seen["waiting_tokens"] = sum(r.prompt + had for r, had in waiting)
        seen["oldest_wait"] = max([self.now_s - r.arrival_s for r, _ in waiting], default=0.0)
        seen["incoming_requests"] = 0
        seen["tpot_slack_min"] = min(slacks, default=0.0)
        seen["tpot_slack_mean"] = sum(slacks) / len(slacks) if slacks else 0.0
        return seen
