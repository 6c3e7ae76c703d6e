"""Data layout of the simulator.

One structured record per instance, so that a single environment is a batch of one.

Records are passed to compiled code by reference: ``state[i].time_s`` in Python and in Numba name
the same memory. Times are seconds since the start of the workload, clocks GHz, energy joules of the
whole instance (all its GPUs).
"""

import numpy as np

RATE_WINDOWS_S = (
    1.0,
    10.0,
    60.0,
)  # time constants of the arrival-rate estimates, s; assumed: a batch, a burst, a minute
TOKEN_RATE_WINDOW_S = 10.0

PARAMS_DTYPE = np.dtype(
    [
        ("token_budget", np.int64),  # prefill: new tokens per batch
        ("max_seqs", np.int64),  # requests per batch
        ("kv_capacity", np.int64),  # decode: tokens of KV cache
        ("kv_watermark", np.float64),  # share of the KV cache kept free when admitting
        ("delay_s", np.float64),  # from a clock request to its effect
        ("min_interval_s", np.float64),  # a decision stands for at least this long
        ("freq_min_ghz", np.float64),
        ("freq_max_ghz", np.float64),
        ("freq_step_ghz", np.float64),
        ("slo_s", np.float64),  # TTFT bound in prefill, TPOT bound in decode
        ("end_s", np.float64),  # length of the episode
        ("drain", np.int64),  # 1: run on until every request is finished
        ("energy_ref_j", np.float64),  # one unit of the reward's energy term
        ("violation_weight", np.float64),  # reward lost per request that misses the SLO
    ]
)

CLOCK_FIELDS = [
    ("freq_ghz", np.float64),  # clock in force
    ("inflight_ghz", np.float64),  # clock on its way
    ("apply_at_s", np.float64),  # when it takes effect; inf: nothing on its way
    ("wanted_ghz", np.float64),  # newest request
    ("n_switches", np.int64),  # clock changes that took effect
]

STEP_FIELDS = [
    ("step_start_s", np.float64),
    ("step_duration_s", np.float64),  # busy time of the step
    ("step_idle_s", np.float64),  # idle time that follows it
    ("step_energy_j", np.float64),  # busy and idle
    ("step_energy_idle_j", np.float64),
    ("step_freq_start_ghz", np.float64),  # clock in force when the step began
    ("step_freq_mean_ghz", np.float64),  # time-weighted effective clock while busy
    ("step_requests", np.int64),  # requests in the (last) batch
    ("step_tokens", np.int64),  # GEMM rows of the (last) batch
    ("step_queue", np.int64),  # requests waiting behind it when the step began
    ("step_kv_use", np.float64),  # share of KV in use when the step began
    ("step_iterations", np.int64),
    ("step_finished", np.int64),
    ("step_violations", np.int64),
]

COMMON_FIELDS = [
    ("time_s", np.float64),
    ("begin", np.int64),  # workload rows [begin, end) of the shared request arrays
    ("end", np.int64),
    ("head", np.int64),  # first request not finished (prefill) / not yet admitted (decode)
    ("tail", np.int64),  # first request not yet arrived
    ("done", np.int64),  # 1: the episode is over
    (
        "rate_sum",
        np.float64,
        (len(RATE_WINDOWS_S),),
    ),  # exponentially decayed arrival counts / window
    ("token_rate_sum", np.float64),
    ("rate_time_s", np.float64),  # when the sums were last decayed
    ("rate_start_s", np.float64),  # since when arrivals are counted
    ("last_time_s", np.float64),  # duration of the last iteration
    ("last_power_w", np.float64),  # its mean power per GPU
    ("energy_j", np.float64),
    ("energy_idle_j", np.float64),
    ("busy_s", np.float64),
    ("iterations", np.int64),
    ("finished", np.int64),
    ("violations", np.int64),
    (
        "backpressure",
        np.float64,
    ),  # share of decode KV already spoken for, 0 when there is no decode pool
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
        ("incoming", np.int64),  # requests whose KV is still on its way here
    ]
)

SLOT_DTYPE = np.dtype(
    [
        ("request", np.int64),
        (
            "base",
            np.int64,
        ),  # iteration count at which it had produced no token; tokens = iterations - base
        (
            "key_s",
            np.float64,
        ),  # start - slo * base: its TPOT slack is key + slo * (iterations - 1) - now
        (
            "ring_next",
            np.int32,
        ),  # neighbours among those that finish in the same iteration; also the list of free slots
        ("ring_prev", np.int32),
        ("older", np.int32),  # neighbours in order of admission
        ("newer", np.int32),
    ]
)
