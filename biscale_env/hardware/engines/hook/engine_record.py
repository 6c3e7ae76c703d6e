"""What an engine tells about an iteration.

ForwardPassMetrics v1, and beside it what a controller of deadlines needs.

The base is the schema that NVIDIA Dynamo and SGLang publish (field names and meaning theirs,
version 1, msgpack maps): sums over a batch. Deadlines need single requests, so our own hooks add
:class:`Detail`; readers of plain ForwardPassMetrics skip it, and records without it are completed
by estimates (``biscale_env.hardware.engines.estimate``). Our own hooks leave the variances at 0:
nobody here reads them.
"""

from array import array
from collections.abc import Iterable

import msgspec

VERSION = 1


class Scheduled(msgspec.Struct, frozen=True, gc=False):
    """Requests of this iteration."""

    num_prefill_requests: int = 0
    sum_prefill_tokens: int = 0  # new tokens, without cached prefixes and earlier chunks
    var_prefill_length: float = 0.0
    sum_prefill_kv_tokens: int = 0  # cached prefixes and earlier chunks, read but not computed
    num_decode_requests: int = 0
    sum_decode_kv_tokens: int = 0
    var_decode_kv_tokens: float = 0.0


class Queued(msgspec.Struct, frozen=True, gc=False):
    """Requests that wait."""

    num_prefill_requests: int = 0
    sum_prefill_tokens: int = 0
    var_prefill_length: float = 0.0
    num_decode_requests: int = 0  # preempted
    sum_decode_kv_tokens: int = 0
    var_decode_kv_tokens: float = 0.0


class Detail(msgspec.Struct, frozen=True, gc=False):
    """State at the decision, just before the forward pass. Times are CLOCK_MONOTONIC seconds.

    Tables are float64, row after row.

    Attributes:
        time_s: when this state was taken.
        epoch_s: when the engine began to count arrivals.
        waiting: rows (arrival, prompt tokens, tokens done) in the order of service. Prefill: those
            of the batch about to run first, then the queue. Decode: those that have no place yet.
        waiting_more: requests beyond these rows; they are taken to be as long as the mean of the
            rows.
        preempted: decode, rows (arrival, prompt tokens, output tokens so far) of requests to be
            recomputed.
        running_start: decode, per running request the time of its first token.
        running_tokens: decode, per running request its output tokens so far.
        cached_tokens: tokens in the KV cache that the iteration reads.
        kv_use: fraction of the KV cache in use.
        recompute_tokens: decode, tokens that the iteration recomputes.
        incoming: requests whose KV is being transferred to here.
        arrived: requests since ``epoch_s``.
        arrived_tokens: their prompt tokens.
        recent: rows (arrival, prompt tokens) of requests that came since the record before this
            one.
        hook_s: time that the engine spent on making and sending the record before this one.
        ahead: iterations that were formed before that of the record and have not ended: 0 when it
            begins now, 1 under asynchronous scheduling. What the record tells is then the state at
            the begin of its iteration, as far as the engine knows it, taken early, at ``time_s``.
        running_since_s: when the oldest of those began; 0 when there is none.
    """

    time_s: float
    epoch_s: float
    waiting: bytes = b""
    waiting_more: int = 0
    preempted: bytes = b""
    running_start: bytes = b""
    running_tokens: bytes = b""
    cached_tokens: int = 0
    kv_use: float = 0.0
    recompute_tokens: int = 0
    incoming: int = 0
    arrived: int = 0
    arrived_tokens: int = 0
    recent: bytes = b""
    hook_s: float = 0.0
    ahead: int = 0
    running_since_s: float = 0.0


class EngineRecord(msgspec.Struct, frozen=True, gc=False):
    """One iteration, number ``counter_id``.

    ``wall_time``: duration of the last iteration that has ended, s: of the one before, or
    ``detail.ahead`` further back. 0 is an idle heartbeat without ``detail``.
    """

    version: int = VERSION
    worker_id: str = ""
    dp_rank: int = 0
    counter_id: int = 0
    wall_time: float = 0.0
    scheduled_requests: Scheduled = Scheduled()
    queued_requests: Queued = Queued()
    detail: Detail | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing is said about single requests."""
        return (
            self.detail is None
            and self.scheduled_requests.num_prefill_requests
            + self.scheduled_requests.num_decode_requests
            == 0
        )


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(EngineRecord)


def encode(record: EngineRecord) -> bytes:
    """Bytes of a record; a reader of plain ForwardPassMetrics can decode them too."""
    return _encoder.encode(record)


def decode(data: bytes) -> EngineRecord:
    """Record of bytes.

    Raises:
        ValueError: not a record, or a schema version that means something else.
    """
    try:
        record = _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise ValueError(f"not an engine record: {error}") from None
    if record.version != VERSION:
        raise ValueError(
            f"engine records of schema version {record.version} came, "
            f"but only version {VERSION} is known"
        )
    return record


def table(rows: Iterable[float]) -> bytes:
    """Pack numbers as float64."""
    return array("d", rows).tobytes()
