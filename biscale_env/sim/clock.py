"""The clock and the work done under it: actuation delay, power cap, idle power.

Shared by both phases.

The clock follows the rules of :mod:`biscale_env.core.clockqueue`: a requested clock takes effect
``delay_s`` later, one change is in flight at a time, and the newest request waits.

What an idle instance draws has two rules. *Last clock*: the idle power at the clock in effect.
*Parked*: one power whatever the clock, from the first instant of every wait; when work arrives the
instance runs at the lowest clock for ``parked_ramp_s``, and only then at the clock in effect
(which requests go on to change meanwhile). So parking is charged in full however short the wait.
"""

from typing import Any, NamedTuple

from biscale_env.core.clockqueue import (
    ClockQueue,
    request,
    settled_at,
    snapped,
    take_effect,
    wait_s,
)
from biscale_env.core.jit import inlined
from biscale_env.models.physics import (
    ClockTerms,
    clock_terms,
    idle_power_w,
    iteration_at,
    iteration_under_cap,
)


@inlined
def snap_ghz(p: Any, freq_ghz: float) -> float:
    """Nearest supported clock within the range, GHz."""
    return snapped(freq_ghz, p.freq_min_ghz, p.freq_max_ghz, p.freq_step_ghz)


@inlined
def clock_of(st: Any) -> ClockQueue:
    """The clock of an instance, GHz."""
    return ClockQueue(st.freq_ghz, st.inflight_ghz, st.requested_ghz, st.apply_at_s)


@inlined
def set_clock(st: Any, q: ClockQueue) -> None:
    """Write the clock of an instance; a change of the one in effect is counted."""
    if q.applied != st.freq_ghz:
        st.n_switches += 1
    st.freq_ghz = q.applied
    st.inflight_ghz = q.inflight
    st.requested_ghz = q.requested
    st.apply_at_s = q.apply_at_s


@inlined
def request_clock(st: Any, p: Any, freq_ghz: float) -> None:
    """Request a (supported) clock now."""
    if freq_ghz != st.requested_ghz:
        set_clock(st, request(clock_of(st), freq_ghz, st.time_s, p.delay_s))


@inlined
def apply_clock(st: Any, p: Any) -> None:
    """The clock in flight takes effect."""
    set_clock(st, take_effect(clock_of(st), p.delay_s))


@inlined
def waiting_power_w(c: Any, p: Any, freq_ghz: float) -> float:
    """Power per GPU of an instance that waits with this clock in effect, W."""
    if p.parked == 1:
        return float(p.parked_w)
    return float(idle_power_w(c, freq_ghz))


@inlined
def running_ghz(st: Any, p: Any) -> float:
    """Clock at which work runs now: the one in effect, or the lowest while the ramp lasts, GHz."""
    if st.time_s < st.ramp_until_s:
        return float(p.freq_min_ghz)
    return float(st.freq_ghz)


@inlined
def under_cap(
    c: Any, p: Any, tokens: float, attn_work: float, cached: float, n_seq: float, freq_ghz: float
) -> Any:
    """What an iteration does at a requested clock.

    ``(effective clock in GHz, duration in s, energy per GPU in J)``.
    """
    return iteration_under_cap(c, tokens, attn_work, cached, n_seq, freq_ghz, p.freq_min_ghz)


@inlined
def at_clock(
    st: Any, c: Any, p: Any, tokens: float, attn_work: float, cached: float, n_seq: float
) -> Any:
    """As :func:`under_cap`, at the clock in effect, whose terms are kept while it stands."""
    if st.terms_ghz != st.freq_ghz:
        new = clock_terms(c, st.freq_ghz)
        st.terms_ghz, st.terms_ratio = new.freq_ghz, new.ratio
        st.terms_stretch, st.terms_voltage = new.stretch, new.voltage
    at = ClockTerms(st.freq_ghz, st.terms_ratio, st.terms_stretch, st.terms_voltage)
    return iteration_at(c, tokens, attn_work, cached, n_seq, at, p.freq_min_ghz)


class WorkDone(NamedTuple):
    """What an iteration under way has done."""

    remaining: float  # fraction still to do
    energy_j: float  # per GPU
    cycles: float  # effective clock integrated over time, GHz s


@inlined
def work_until(st: Any, work: WorkDone, pace: Any, until_s: float) -> WorkDone:
    """Work on at the pace of :func:`under_cap` until a time before the end of the iteration."""
    freq, duration, joules = pace
    part = max(until_s - st.time_s, 0.0) / duration
    st.time_s = max(until_s, st.time_s)
    return WorkDone(
        work.remaining - part, work.energy_j + part * joules, work.cycles + part * duration * freq
    )


@inlined
def finish_work(st: Any, c: Any, start_s: float, work: WorkDone, pace: Any) -> None:
    """Work on to the end of the iteration that began at ``start_s``, and book it."""
    freq, duration, joules = pace
    energy_j = work.energy_j + work.remaining * joules
    cycles = work.cycles + work.remaining * duration * freq
    st.time_s += work.remaining * duration
    elapsed = st.time_s - start_s
    st.last_time_s = elapsed
    st.last_power_w = energy_j / elapsed
    st.energy_j += energy_j * c.n_gpus
    st.busy_s += elapsed
    st.step_energy_j += energy_j * c.n_gpus
    st.step_freq_mean_ghz += cycles
    st.step_duration_s += elapsed
    st.step_iterations += 1
    st.iterations += 1


@inlined
def ramp_work(
    st: Any, c: Any, p: Any, tokens: float, attn_work: float, cached: float, n_seq: float
) -> WorkDone:
    """Begin an iteration at the lowest clock: to the end of the ramp, or its own."""
    if st.step_iterations == 0:
        st.step_freq_start_ghz = p.freq_min_ghz
    pace = under_cap(c, p, tokens, attn_work, cached, n_seq, p.freq_min_ghz)
    if st.time_s + pace[1] <= st.ramp_until_s:
        st.time_s += pace[1]
        return WorkDone(0.0, pace[2], pace[1] * pace[0])
    return work_until(st, WorkDone(1.0, 0.0, 0.0), pace, st.ramp_until_s)


@inlined
def run_work(
    st: Any, c: Any, p: Any, tokens: float, attn_work: float, cached: float, n_seq: float
) -> None:
    """Run one iteration to its end.

    A clock that takes effect meanwhile changes the speed of what is left of it, and so does the end
    of the ramp of an instance that was parked. (Clocks that took effect during the ramp are applied
    after it: nothing ran at them.)
    """
    start = st.time_s
    work = WorkDone(1.0, 0.0, 0.0)
    if start < st.ramp_until_s:
        work = ramp_work(st, c, p, tokens, attn_work, cached, n_seq)
    while True:
        pace = at_clock(st, c, p, tokens, attn_work, cached, n_seq)
        if not st.time_s + work.remaining * pace[1] > st.apply_at_s:
            break
        work = work_until(st, work, pace, st.apply_at_s)
        apply_clock(st, p)
    finish_work(st, c, start, work, pace)


@inlined
def run_idle(st: Any, c: Any, p: Any, until_s: float) -> None:
    """Wait until ``until_s``, drawing idle power; a parked instance begins its ramp then."""
    start = st.time_s
    joules = 0.0
    while st.apply_at_s < until_s:
        joules += idle_power_w(c, st.freq_ghz) * max(st.apply_at_s - st.time_s, 0.0)
        st.time_s = max(st.apply_at_s, st.time_s)
        apply_clock(st, p)
    joules += idle_power_w(c, st.freq_ghz) * (until_s - st.time_s)
    st.time_s = until_s
    if p.parked == 1 and until_s > start:  # whatever the clocks were
        joules = waiting_power_w(c, p, st.freq_ghz) * (until_s - start)
        st.ramp_until_s = until_s + p.parked_ramp_s
    joules *= c.n_gpus
    st.energy_j += joules
    st.energy_idle_j += joules
    st.step_energy_j += joules
    st.step_energy_idle_j += joules
    st.step_idle_s += until_s - start


@inlined
def begin_step(st: Any) -> None:
    """Clear the per-step sums."""
    st.step_start_s = st.time_s
    st.step_duration_s = 0.0
    st.step_idle_s = 0.0
    st.step_energy_j = 0.0
    st.step_energy_idle_j = 0.0
    st.step_freq_start_ghz = st.freq_ghz
    st.step_freq_mean_ghz = 0.0
    st.step_iterations = 0
    st.step_finished = 0
    st.step_violations = 0
    st.step_missed = 0.0


@inlined
def end_step(st: Any) -> None:
    """Turn the cycle count of the step into its mean clock."""
    if st.step_duration_s > 0.0:
        st.step_freq_mean_ghz /= st.step_duration_s


@inlined
def start_clock(st: Any, freq_ghz: float) -> None:
    """Begin an episode at a settled clock, without a ramp."""
    set_clock(st, settled_at(freq_ghz))
    st.terms_ghz = 0.0  # the coefficients may be others than in the last episode
    st.ramp_until_s = 0.0
    st.n_switches = 0


@inlined
def time_to_apply_s(st: Any, p: Any) -> float:
    """Time until work runs at the newest requested clock, s (0 when it does)."""
    wait = wait_s(clock_of(st), st.time_s, p.delay_s)
    if st.time_s < st.ramp_until_s:
        return float(max(wait, st.ramp_until_s - st.time_s))
    return wait
