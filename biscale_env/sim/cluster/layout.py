"""Data layout of a cluster: records and queues of its instances, and the log of requests.

An instance of a cluster holds the same record as a single instance (:mod:`biscale_env.sim.state`)
and runs the same transitions. What is added here: a queue of its own that the router fills, the
rule and clock it is given, and the KV it keeps for others. Rows of a queue that are over are
dropped between calls, so memory does not grow with the length of a trace.

Kernels take named groups: :class:`ClusterArrays` holds everything, :class:`Prefills` and
:class:`Decodes` the instances of a phase, with one row per instance in every array.
"""

from typing import NamedTuple

import numpy as np

from biscale_env.sim.prefix_cache import Blocks, PrefixCache
from biscale_env.sim.state import Floats, Ints, Records, RunningRequests, ShortInts

STATIC, SLACK, MPC, ECOFREQ, THROTTLLEM, EXTERNAL = range(6)  # tier-2 rules, see tier2_rules
POLICIES = ("static", "slack", "mpc", "ecofreq", "throttllem", "external")

WEIGHTED, ROUND_ROBIN, SHORTEST, WHAT_IF, CACHE_AWARE = range(5)  # routers, see routing
ROUTERS = ("weighted", "round_robin", "shortest", "what_if", "cache_aware")

INSTANCE_DTYPE = np.dtype(
    [
        ("policy", np.int64),  # index into POLICIES
        ("base_ghz", np.float64),  # clock of tier 1; the clock of the static policy
        ("decided_ghz", np.float64),  # answer of an external policy; 0: none yet
        ("margin", np.float64),  # fraction of the SLO that the policy keeps free
        ("kv_guard", np.float64),  # decode: KV use above which slack takes the highest clock
        ("ahead", np.float64),  # throttllem: iterations that the KV is projected ahead
        ("weight", np.float64),  # fraction of the load in weighted routing; speed in the others
        ("accepting", np.int64),  # 1: the router may choose it
        ("ready_s", np.float64),  # runs nothing before (cold start, re-shard)
        ("running", np.int64),  # 1: an iteration is under way and ends at time_s of the record
        ("stalled", np.int64),  # prefill: waits for decode to take KV over
        ("next_head", np.int64),  # prefill: head after the batch under way
        ("next_head_done", np.int64),
        ("load_tokens", np.int64),  # tokens not yet prefilled / queued and not yet admitted
        ("held_tokens", np.int64),  # prefill: KV of requests that decode has not admitted yet
        ("cache_tokens", np.int64),  # prefill: room of the prefix cache; 0: none
        ("reserved_tokens", np.int64),  # co-located: KV of prompts in progress
        ("link_free_s", np.float64),  # prefill: its network link is busy until then
        ("link_bytes_per_s", np.float64),  # network of all its GPUs together
        ("born_s", np.float64),
        ("retired_s", np.float64),  # inf: in service
        ("routed", np.int64),  # requests sent here
        ("work_tokens", np.int64),  # rows of the iterations begun; not counted where co-located
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
        ("transfer_overlap", np.float64),  # fraction of the bytes that travel during prefill
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
        ("cached_tokens", np.int32),  # of the prompt, found in the prefix cache
        ("prefill", np.int32),  # instances that served it
        ("decode", np.int32),  # -1: a single output token needs no decode
    ]
)


class PromptQueue(NamedTuple):
    """Requests of prefill instances in order of arrival, (instances, rows)."""

    arrival_s: Floats
    prompt: ShortInts  # tokens to be computed, behind the cached prefix
    output: ShortInts
    prefix: ShortInts  # tokens before these that are in the prefix cache
    request: Ints  # number of the request since the beginning


class BatchPlans(NamedTuple):
    """Projected prefill batches, scratch of the rules that look ahead."""

    latency_s: Floats  # (instances, HORIZON, levels)
    energy_j: Floats  # likewise, of one GPU
    deadline_s: Floats  # (instances, HORIZON), s from now; inf: none that can still be met
    level: Ints  # (instances, HORIZON)


class Prefills(NamedTuple):
    """Prefill instances; the first axis of every array is the instance."""

    states: Records  # PREFILL_DTYPE
    coefs: Records  # COEFFICIENT_DTYPE
    params: Records  # PARAMS_DTYPE
    meta: Records  # INSTANCE_DTYPE
    next_s: Floats  # time of the next event, inf: asleep
    queue: PromptQueue
    plans: BatchPlans
    cache: PrefixCache


class ReadyQueue(NamedTuple):
    """Requests of decode (or co-located) instances in order of readiness, (instances, rows)."""

    ready_s: Floats  # when the KV (co-located: the prompt) is there
    first_s: Floats  # when the first token came; TPOT counts from there
    arrival_s: Floats
    prompt: ShortInts
    output: ShortInts
    cached: ShortInts  # tokens of the prompt that prefill found in its prefix cache
    request: Ints
    source: ShortInts  # prefill instance that holds the KV, -1: none


class Decodes(NamedTuple):
    """Decode (or co-located) instances; the first axis of every array is the instance."""

    states: Records  # DECODE_DTYPE
    coefs: Records
    params: Records
    meta: Records
    next_s: Floats
    queue: ReadyQueue
    running: RunningRequests


class OfferedWork(NamedTuple):
    """Requests on offer."""

    arrival_s: Floats  # since the beginning of the run
    prompt: ShortInts
    output: ShortInts
    first: int  # number of the first request
    blocks: Blocks  # of the prompts; without starts where nobody knows them


class ClusterArrays(NamedTuple):
    """Everything that the event loops read and write."""

    totals: np.record  # CLUSTER_DTYPE
    prefills: Prefills
    decodes: Decodes
    work: OfferedWork
    log: Records  # LOG_DTYPE, with room for every request in the cluster and on offer
    levels_ghz: Floats  # clocks that the rules choose from, rising
    no_times: Floats  # empty: transitions keep no times per request here, the log does


class QueuedRequest(NamedTuple):
    """A request on its way into the queue of a decode (or co-located) instance."""

    ready_s: float
    first_s: float
    arrival_s: float
    prompt: int
    output: int
    cached: int
    request: int
    source: int


class FinishedRequest(NamedTuple):
    """A request whose last token has come: a row of the log."""

    request: int
    arrival_s: float
    first_token_s: float
    finish_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    prefill: int
    decode: int
