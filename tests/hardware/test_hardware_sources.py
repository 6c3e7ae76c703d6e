"""Records from engines without our hook."""

import http.server
import threading
import time

import msgspec
import pytest
import zmq

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.engines.hook import engine_record
from biscale_env.hardware.engines.hook.engine_record import EngineRecord, Scheduled
from biscale_env.hardware.engines.sources import (
    PrometheusPoller,
    forward,
    metrics_stream,
    parse_prometheus,
    polled,
)

VLLM = """# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_waiting{engine="0"} 2.0
vllm:prompt_tokens_total{engine="0"} 1000.0
vllm:request_success_total{finished_reason="length"} 3.0
vllm:request_success_total{finished_reason="stop"} 1.0
vllm:iteration_tokens_total_bucket{le="1.0"} 99.0
broken line
vllm:bad NaNumber
"""


@pytest.fixture
def site():
    """A loopback site with metrics that the test can change."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.server.text.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.text = VLLM
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def test_labels_are_summed_and_buckets_left_out():
    values = parse_prometheus(VLLM)
    assert values == {
        "vllm:num_requests_running": 3.0,
        "vllm:num_requests_waiting": 2.0,
        "vllm:prompt_tokens_total": 1000.0,
        "vllm:request_success_total": 4.0,
    }


def test_ranks_are_summed_and_odd_lines_cost_only_themselves():
    text = (
        'sglang:num_running_reqs{tp_rank="0",model="a b\\"c{"} 3\n'
        'sglang:num_running_reqs{tp_rank="1",model="x"} 4.0 1712000000\n'
        "sglang:num_running_reqs NaN\n"
        "sglang:broken{ 7\n<html>\n{} 1\n\n"
        "# TYPE vllm:prompt_tokens counter\nvllm:prompt_tokens 9\n"
        'lat_bucket{le="+Inf"} 5\nlat_sum 1.5e1\nlat_count +Inf\n'
    )
    assert parse_prometheus(text) == {
        "sglang:num_running_reqs": 7.0,
        "vllm:prompt_tokens": 9.0,
        "lat_sum": 15.0,
    }


def test_a_poll_is_a_record_of_counts_and_mean_lengths(site):
    poller = PrometheusPoller(site.url)
    first = poller.poll()
    assert (
        first.scheduled_requests.num_decode_requests,
        first.queued_requests.num_prefill_requests,
    ) == (3, 2)
    assert first.queued_requests.sum_prefill_tokens == 2 * 250
    site.text = VLLM.replace("1000.0", "1600.0").replace('"stop"} 1.0', '"stop"} 3.0')
    assert (
        poller.poll().queued_requests.sum_prefill_tokens == 2 * 300
    )  # the mean of what came since


def test_sglang_names_are_known(site):
    site.text = "sglang:num_running_reqs 5\nsglang:num_queue_reqs 1\n"
    assert (
        PrometheusPoller(site.url + "/metrics").poll().scheduled_requests.num_decode_requests == 5
    )


def test_another_site_is_no_engine(site):
    site.text = "go_gc_duration_seconds 1\n"
    with pytest.raises(BiscaleError, match="without the metrics"):
        PrometheusPoller(site.url).poll()


def test_nobody_answers():
    with pytest.raises(BiscaleError, match="does not answer"):
        PrometheusPoller("http://127.0.0.1:9").poll()


@pytest.mark.slow
def test_polling_keeps_its_rate(site):
    start, count = time.monotonic(), 0
    for _ in polled(PrometheusPoller(site.url), 0.05, lambda: time.monotonic() - start > 0.5):
        count += 1
    assert 8 <= count <= 12


def publish(context, endpoint, frames, until):
    socket = context.socket(zmq.PUB)
    socket.bind(endpoint)
    while not until.is_set():
        socket.send_multipart(frames)
        time.sleep(0.02)
    socket.close(0)


def stream_of(tmp_path, payload, take):
    context, done = zmq.Context(), threading.Event()
    endpoint = f"ipc://{tmp_path}/fpm.sock"
    thread = threading.Thread(
        target=publish, args=(context, endpoint, [b"topic", b"\x00" * 8, payload], done)
    )
    thread.start()
    try:
        found = []
        for record in metrics_stream(endpoint):
            found.append(record)
            if len(found) == take:
                return found
    finally:
        done.set()
        thread.join()
        context.destroy(0)


def test_the_stream_of_dynamo_and_sglang_is_understood(tmp_path):
    """Three frames, the last one a msgpack map of the published schema, possibly with fields of a
    newer engine.
    """
    plain = {
        "version": 1,
        "worker_id": "w7",
        "counter_id": 3,
        "wall_time": 0.031,
        "timing_scope": "cuda",
        "scheduled_requests": {"num_decode_requests": 4, "sum_decode_kv_tokens": 900},
        "queued_requests": {},
    }
    (record,) = stream_of(tmp_path, msgspec.msgpack.encode(plain), 1)
    assert (record.worker_id, record.wall_time, record.scheduled_requests.sum_decode_kv_tokens) == (
        "w7",
        0.031,
        900,
    )
    assert record.detail is None
    assert not record.idle


# The published schema, version 1 (dynamo/common/forward_pass_metrics.py,
# sglang/srt/observability/forward_pass_metrics.py): names in order.
FPM = [
    "version",
    "worker_id",
    "dp_rank",
    "counter_id",
    "wall_time",
    "scheduled_requests",
    "queued_requests",
]
FPM_SCHEDULED = [
    "num_prefill_requests",
    "sum_prefill_tokens",
    "var_prefill_length",
    "sum_prefill_kv_tokens",
    "num_decode_requests",
    "sum_decode_kv_tokens",
    "var_decode_kv_tokens",
]
FPM_QUEUED = [name for name in FPM_SCHEDULED if name != "sum_prefill_kv_tokens"]


def published(name, fields, **types):
    """A struct as the engines declare it: frozen, integers but for variances."""
    kinds = (
        {"worker_id": str, "wall_time": float}
        | {f: float for f in fields if f.startswith("var_")}
        | types
    )
    return msgspec.defstruct(name, [(f, kinds.get(f, int)) for f in fields], frozen=True)


def test_our_records_are_the_published_structs():
    """Field by field, both ways through real msgspec structs.

    The order too, should an engine encode structs as arrays one day.
    """
    scheduled, queued = published("Scheduled", FPM_SCHEDULED), published("Queued", FPM_QUEUED)
    metrics = published("Metrics", FPM, scheduled_requests=scheduled, queued_requests=queued)
    ours = [f.name for f in msgspec.structs.fields(EngineRecord)]
    assert ours == [*FPM, "detail"]
    assert [f.name for f in msgspec.structs.fields(engine_record.Scheduled)] == FPM_SCHEDULED
    assert [f.name for f in msgspec.structs.fields(engine_record.Queued)] == FPM_QUEUED
    theirs = metrics(
        1, "w", 2, 3, 0.5, scheduled(1, 2, 3.5, 4, 5, 6, 7.5), queued(8, 9, 10.5, 11, 12, 13.5)
    )
    record = engine_record.decode(msgspec.msgpack.encode(theirs))
    assert record.detail is None
    back = msgspec.msgpack.decode(engine_record.encode(record), type=metrics)
    assert back == theirs


def test_a_struct_that_is_no_forward_pass_metrics_is_refused(tmp_path):
    stranger = msgspec.msgpack.encode({"version": 1, "scheduled_requests": [1, 2, 3]})
    with pytest.raises(BiscaleError, match="not an engine record"):
        stream_of(tmp_path, stranger, 1)


def test_an_unknown_schema_is_refused(tmp_path):
    with pytest.raises(BiscaleError, match="version 9"):
        stream_of(tmp_path, engine_record.encode(EngineRecord(version=9)), 1)


def test_a_senseless_address_is_refused():
    with pytest.raises(BiscaleError, match="cannot listen"):
        next(metrics_stream("nonsense://x"))


def test_records_are_handed_on():
    class Sink:
        def __init__(self):
            self.got = []

        def send(self, record):
            self.got.append(record)
            return True

    sink = Sink()
    assert forward(iter([EngineRecord(scheduled_requests=Scheduled(1, 5))] * 3), sink) == 3
    assert len(sink.got) == 3
