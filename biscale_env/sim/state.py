"""Data layout of the simulator.

One structured record per instance, so that a single environment is a batch of one; named groups of
arrays for requests and for what runs.

Records are passed to compiled code by reference: ``state[i].time_s`` in Python and in Numba name
the same memory. Times are seconds since the start of the workload, clocks GHz, energy joules of the
whole instance (all its GPUs).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.config.slo import MOST_CLASSES

# time constants of the arrival-rate estimates, s; assumed: a batch, a burst, a minute
RATE_WINDOWS_S = (1.0, 10.0, 60.0)
TOKEN_RATE_WINDOW_S = 10.0

PARAMS_DTYPE = np.dtype(
    [
        ("token_budget", np.int64),  # prefill: new tokens per batch
        ("max_seqs", np.int64),  # requests per batch
        ("kv_capacity", np.int64),  # decode: tokens of KV cache
        ("kv_watermark", np.float64),  # fraction of the KV cache kept free when admitting
        ("delay_s", np.float64),  # from a clock request to its effect
        ("min_interval_s", np.float64),  # a decision stands for at least this long
        ("freq_min_ghz", np.float64),
        ("freq_max_ghz", np.float64),
        ("freq_step_ghz", np.float64),
        ("slo_s", np.float64),  # TTFT bound in prefill, TPOT bound in decode
        ("end_s", np.float64),  # length of the episode
        ("drain", np.int64),  # 1: run on until every request is finished
        ("parked", np.int64),  # 1: an idle instance is parked, see sim/clock.py
        ("parked_w", np.float64),  # power of one GPU of a parked instance
        ("parked_ramp_s", np.float64),  # from the arrival of work to the end of the lowest clock
        ("energy_ref_j", np.float64),  # one unit of the reward's energy term
        ("violation_weight", np.float64),  # reward taken off per SLO-violating request
        ("classes", np.int64),  # SLO classes of requests; 0: one bound for all
        ("class_scale", np.float64, (MOST_CLASSES,)),  # bound of each, in units of slo_s
        ("class_weight", np.float64, (MOST_CLASSES,)),  # of its violations in the reward
    ]
)

CLOCK_FIELDS = [
    ("freq_ghz", np.float64),  # clock in effect
    ("inflight_ghz", np.float64),  # clock in flight
    ("apply_at_s", np.float64),  # when it takes effect; inf: nothing in flight
    ("requested_ghz", np.float64),  # newest request
    ("ramp_until_s", np.float64),  # until then a woken instance runs at the lowest clock
    ("n_switches", np.int64),  # clock changes that took effect
    ("terms_ghz", np.float64),  # clock that the following are of; 0: of none
    ("terms_ratio", np.float64),  # see models.physics.ClockTerms
    ("terms_stretch", np.float64),
    ("terms_voltage", np.float64),
]

STEP_FIELDS = [
    ("step_start_s", np.float64),
    ("step_duration_s", np.float64),  # busy time of the step
    ("step_idle_s", np.float64),  # idle time that follows it
    ("step_energy_j", np.float64),  # busy and idle
    ("step_energy_idle_j", np.float64),
    ("step_freq_start_ghz", np.float64),  # clock in effect when the step began
    ("step_freq_mean_ghz", np.float64),  # time-weighted effective clock while busy
    ("step_requests", np.int64),  # requests in the (last) batch
    ("step_tokens", np.int64),  # GEMM rows of the (last) batch
    ("step_queue", np.int64),  # requests waiting behind it when the step began
    ("step_kv_use", np.float64),  # fraction of KV in use when the step began
    ("step_iterations", np.int64),
    ("step_finished", np.int64),
    ("step_violations", np.int64),
    ("step_missed", np.float64),  # the same, weighted by class
]

COMMON_FIELDS = [
    ("time_s", np.float64),
    ("begin", np.int64),  # workload rows [begin, end) of the shared request arrays
    ("end", np.int64),
    ("head", np.int64),  # first request not finished (prefill) / not yet admitted (decode)
    ("tail", np.int64),  # first request not yet arrived
    ("done", np.int64),  # 1: the episode is over
    ("rate_sum", np.float64, (len(RATE_WINDOWS_S),)),  # decayed arrival counts / window
    ("token_rate_sum", np.float64),
    ("rate_time_s", np.float64),  # when the sums were last decayed
    ("rate_start_s", np.float64),  # since when arrivals are counted
    ("queue_tokens", np.float64),  # prompt tokens of requests ``head`` to ``tail``
    ("last_time_s", np.float64),  # duration of the last iteration
    ("last_power_w", np.float64),  # its mean power per GPU
    ("energy_j", np.float64),
    ("energy_idle_j", np.float64),
    ("busy_s", np.float64),
    ("iterations", np.int64),
    ("finished", np.int64),
    ("violations", np.int64),
    ("backpressure", np.float64),  # fraction of decode KV spoken for; 0 without a decode pool
]

PREFILL_DTYPE = np.dtype([*COMMON_FIELDS, *CLOCK_FIELDS, *STEP_FIELDS, ("head_done", np.int64)])

DECODE_DTYPE = np.dtype(
    [
        *COMMON_FIELDS,
        *CLOCK_FIELDS,
        *STEP_FIELDS,
        ("batch", np.int64),  # running requests
        ("cached", np.int64),  # tokens in the KV cache
        ("recompute_tokens", np.int64),  # tokens whose KV must be rebuilt in the next iteration
        ("recompute_attn", np.float64),
        ("admitted_last", np.int64),  # slot of the newest running request, -1: none
        ("free_slot", np.int64),  # head of the list of free slots
        ("preempted", np.int64),  # requests waiting to be recomputed (a stack)
        ("preemptions", np.int64),
        ("key_sum", np.float64),  # sum of the slack keys of the running requests
        ("incoming", np.int64),  # requests whose KV is in flight to here
    ]
)

SLOT_DTYPE = np.dtype(
    [
        ("request", np.int64),
        # iteration count at which it had produced no token: its tokens are iterations - origin
        ("origin", np.int64),
        # start - slo * origin: its TPOT slack is key + slo * (iterations - 1) - now
        ("key_s", np.float64),
        # neighbours among those that finish in the same iteration; also the list of free slots
        ("wheel_next", np.int32),
        ("wheel_prev", np.int32),
        ("older", np.int32),  # neighbours in order of admission
        ("newer", np.int32),
    ]
)

NO_CLASSES: NDArray[np.int8] = np.zeros(0, dtype=np.int8)
"""For requests that share one bound."""

NO_PREFIXES: NDArray[np.int32] = np.zeros(0, dtype=np.int32)
"""For requests of which nothing is cached."""

Records = NDArray[np.record]  # records with the fields of a dtype above
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ShortInts = NDArray[np.int32]
Classes = NDArray[np.int8]


class Requests(NamedTuple):
    """Requests in order of arrival, one row each."""

    arrival_s: Floats  # decode: when the request reaches the pool; its TPOT counts from there
    prompt: ShortInts  # tokens to be computed, behind the cached prefix; decode: all of it
    output: ShortInts
    prefix: ShortInts  # tokens before these in the prefix cache; empty: none; decode: unused
    slo_class: Classes  # SLO class; empty where there is one bound for all


class RequestTimes(NamedTuple):
    """What became of every request; both arrays are empty where nobody asks."""

    start_s: Floats  # decode: first admitted; not used in prefill
    finish_s: Floats  # first token in prefill, last token in decode


class RunningRequests(NamedTuple):
    """Running and preempted requests of one decode instance; of several, with a leading axis."""

    slots: Records  # SLOT_DTYPE, (max_seqs,)
    wheel: ShortInts  # timing wheel by iteration of the last token, (size,)
    tree: Floats  # tournament tree of slack keys, (2 leaves,)
    stack: Ints  # preempted requests and the tokens that they had, (max_seqs, 2)


class Span(NamedTuple):
    """Rows ``[begin, end)`` of the requests."""

    begin: int
    end: int


def wheel_size(longest_output: int) -> int:
    """Slots of the timing wheel.

    The next power of two above the longest output, so that no two laps meet.
    """
    return int(2 ** np.ceil(np.log2(longest_output + 2)))


def tree_size(max_seqs: int) -> int:
    """Nodes of the tournament tree over ``max_seqs`` keys, node 0 unused."""
    return 2 * int(2 ** np.ceil(np.log2(max_seqs)))


def running_requests(
    lead: tuple[int, ...], max_seqs: int, longest_output: int = 0
) -> RunningRequests:
    """Memory for the running requests of decode instances; ``lead`` is the shape before it."""
    return RunningRequests(
        np.zeros((*lead, max_seqs), dtype=SLOT_DTYPE),  # type: ignore[arg-type]
        np.zeros((*lead, wheel_size(longest_output)), dtype=np.int32),
        np.zeros((*lead, tree_size(max_seqs))),
        np.zeros((*lead, max_seqs, 2), dtype=np.int64),
    )
