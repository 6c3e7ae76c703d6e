"""Data layout of a cluster: the records of its instances, their own request queues, and the log of
finished requests.

An instance of a cluster holds the same record as a single instance (:mod:`biscale_env.sim.state`)
and runs the same transitions. What is added here: a queue of its own that the router fills, what it
is told to do (policy, clock), and the KV it keeps for others. Rows of a queue that are over are
dropped between calls, so memory does not grow with the length of a trace.
"""

from typing import Any, NamedTuple

import numpy as np

STATIC, SLACK, MPC, ECOFREQ, THROTTLLEM, EXTERNAL = range(6)  # tier-2 rules, see cluster_rules
POLICIES = ("static", "slack", "mpc", "ecofreq", "throttllem", "external")

WEIGHTED, ROUND_ROBIN, SHORTEST, WHAT_IF = range(4)  # routers, see cluster_route
ROUTERS = ("weighted", "round_robin", "shortest", "what_if")

INSTANCE_DTYPE = np.dtype(
    [
        ("policy", np.int64),  # index into POLICIES
        ("base_ghz", np.float64),  # clock of tier 1; the clock of the static policy
        ("decided_ghz", np.float64),  # answer of an external policy; 0: none yet
        ("margin", np.float64),  # share of the SLO that the policy keeps back
        ("kv_guard", np.float64),  # decode: share of KV above which slack runs at the highest clock
        ("ahead", np.float64),  # throttllem: iterations that the KV is projected ahead
        ("weight", np.float64),  # share of the load in weighted routing; speed in the other routers
        ("accepting", np.int64),  # 1: the router may choose it
        ("ready_s", np.float64),  # runs nothing before (cold start, re-shard)
        ("running", np.int64),  # 1: an iteration is under way and ends at time_s of the record
        ("stalled", np.int64),  # prefill: waits for decode to take KV over
        ("next_head", np.int64),  # prefill: head after the batch under way
        ("next_head_done", np.int64),
        (
            "load_tokens",
            np.int64,
        ),  # tokens not yet prefilled / tokens queued for decode and not yet admitted
        ("held_tokens", np.int64),  # prefill: KV of requests that decode has not admitted yet
        ("reserved_tokens", np.int64),  # co-located: KV of prompts in progress
        ("link_free_s", np.float64),  # prefill: its network link is busy until then
        ("link_bytes_per_s", np.float64),  # network of all its GPUs together
        ("born_s", np.float64),
        ("retired_s", np.float64),  # inf: in service
        ("routed", np.int64),  # requests sent here
        ("chunk_tokens", np.int64),  # co-located: prompt tokens in the iteration under way
    ]
)

CLUSTER_DTYPE = np.dtype(
    [
        ("next", np.int64),  # first request of the offered work that has not arrived yet
        ("logged", np.int64),  # rows of the log in use
        ("arrived", np.int64),  # since the beginning
        ("finished", np.int64),
        ("prefilled", np.int64),  # requests with a first token
        ("prefilled_tokens", np.int64),  # output tokens that these requests ask for
        ("produced_tokens", np.int64),  # output tokens made, first tokens included
        ("stalls", np.int64),  # prefill batches that had to wait for decode
        ("router_prefill", np.int64),
        ("router_decode", np.int64),
        ("turn_prefill", np.int64),  # round robin
        ("turn_decode", np.int64),
        ("random", np.uint64),  # state of the router's own random numbers
        ("kv_bytes_per_token", np.float64),
        ("transfer_latency_s", np.float64),
        (
            "transfer_overlap",
            np.float64,
        ),  # share of the bytes that travel while prefill still computes
        ("clock_s", np.float64),  # time of the latest event
    ]
)

LOG_DTYPE = np.dtype(
    [
        ("request", np.int64),  # number of the request since the beginning
        ("arrival_s", np.float64),
        ("first_token_s", np.float64),
        ("finish_s", np.float64),
        ("prompt_tokens", np.int32),
        ("output_tokens", np.int32),
        ("prefill", np.int32),  # instances that served it
        ("decode", np.int32),  # -1: a single output token needs no decode
    ]
)


class Prefills(NamedTuple):
    """Prefill instances; first axis: instance, second axis of queues: row."""

    states: Any
    coefs: Any
    params: Any
    meta: Any
    next_s: Any  # time of the next event, inf: asleep
    arrival_s: Any
    prompt: Any
    output: Any
    request: Any
    cumulative: Any  # prompt tokens before each row
    batch_time_s: Any  # scratch of the MPC rule, (instances, HORIZON, levels)
    batch_energy_j: Any
    batch_slack_s: Any  # (instances, HORIZON)
    batch_level: Any  # (instances, HORIZON)


class Decodes(NamedTuple):
    """Decode (or co-located) instances.

    ``ready_s`` is when a request's KV (or, co-located, its prompt) is there.
    """

    states: Any
    coefs: Any
    params: Any
    meta: Any
    next_s: Any
    ready_s: Any
    first_s: Any
    arrival_s: Any
    prompt: Any
    output: Any
    request: Any
    source: Any  # prefill instance that holds the KV
    cumulative: Any
    slots: Any
    ring: Any
    tree: Any
    stack: Any


class Work(NamedTuple):
    """Requests on offer: arrival times since the beginning, lengths, number of the first one."""

    arrival_s: Any
    prompt: Any
    output: Any
    first: int
