"""Records from engines without our hook.

Streams of ForwardPassMetrics (Dynamo, SGLang), and Prometheus polling.

Each source is a small process that turns what it hears into records for the controller, as the hook
would send them. What it cannot know (lengths and ages of single requests) the controller estimates.
"""

import math
import time
import urllib.request
from collections.abc import Callable, Iterator

import zmq
from prometheus_client.parser import text_string_to_metric_families

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.engines.hook.engine_record import EngineRecord, Queued, Scheduled, decode
from biscale_env.hardware.engines.hook.sender import Sender

TIMEOUT_S = 2.0


def metrics_stream(
    endpoint: str, stop: Callable[[], bool] = lambda: False
) -> Iterator[EngineRecord]:
    """ForwardPassMetrics published on ZeroMQ.

    Three frames per message (topic, sequence, payload), the last one is the record.

    Args:
        endpoint: e.g. ``tcp://127.0.0.1:20380`` (Dynamo) or ``ipc:///tmp/...`` (SGLang).
        stop: asked twice a second; True ends the stream.

    Raises:
        BiscaleError: the address makes no sense, or the records have another schema version.
    """
    context = zmq.Context()
    try:
        socket = context.socket(zmq.SUB)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise BiscaleError(f"cannot listen to '{endpoint}': {error.strerror}") from None
        while not stop():
            if socket.poll(500):
                try:
                    yield decode(socket.recv_multipart()[-1])
                except ValueError as error:
                    raise BiscaleError(f"{endpoint}: {error}") from None
    finally:
        context.destroy(0)


def parse_prometheus(text: str) -> dict[str, float]:
    """Sum of every metric over its label sets (ranks, models); histograms: ``_sum``, ``_count``.

    Line by line, so that one that is no sample costs only itself. A sample of NaN counts nothing.
    """
    totals: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#") or line.partition("{")[0].endswith("_bucket"):
            continue
        try:
            samples = [s for f in text_string_to_metric_families(line + "\n") for s in f.samples]
        except (ValueError, KeyError, IndexError):
            continue
        for sample in samples:
            if not math.isnan(sample.value):
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


class PrometheusPoller:
    """State between iterations, as old as the polling interval; sums only."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        self.url = url.rstrip("/") + ("" if url.rstrip("/").endswith("/metrics") else "/metrics")
        self.timeout_s = timeout_s
        self.counter = 0
        self._last: dict[str, float] = {}
        self._prompt_mean = 0.0

    def poll(self) -> EngineRecord:
        """One look at the metrics.

        Raises:
            BiscaleError: no answer, or not the metrics of vLLM or SGLang.
        """
        try:
            with urllib.request.urlopen(self.url, timeout=self.timeout_s) as answer:
                values = parse_prometheus(answer.read().decode(errors="replace"))
        except (OSError, ValueError) as error:
            raise BiscaleError(
                f"{self.url} does not answer ({getattr(error, 'reason', error)})"
            ) from None
        self.counter += 1
        for prefix, names in NAMES.items():
            if f"{prefix}:{names['running']}" in values:
                return self._record({k: values.get(f"{prefix}:{v}", 0.0) for k, v in names.items()})
        raise BiscaleError(
            f"{self.url} answers, but without the metrics of vLLM or SGLang: "
            "is it the engine's address?"
        )

    def _record(self, now: dict[str, float]) -> EngineRecord:
        last, self._last = self._last, now
        prompts = now["finished"] - last.get("finished", 0.0)
        if prompts > 0:
            self._prompt_mean = (now["prompt_tokens"] - last.get("prompt_tokens", 0.0)) / prompts
        waiting = int(now["waiting"])
        return EngineRecord(
            worker_id=self.url,
            counter_id=self.counter,
            wall_time=0.0,
            scheduled_requests=Scheduled(num_decode_requests=int(now["running"])),
            queued_requests=Queued(waiting, round(waiting * self._prompt_mean)),
        )


NAMES = {
    "vllm": {
        "running": "num_requests_running",
        "waiting": "num_requests_waiting",
        "prompt_tokens": "prompt_tokens_total",
        "finished": "request_success_total",
    },
    "sglang": {
        "running": "num_running_reqs",
        "waiting": "num_queue_reqs",
        "prompt_tokens": "prompt_tokens_total",
        "finished": "num_requests_total",
    },
}


def forward(source: Iterator[EngineRecord], sender: Sender) -> int:
    """Send every record of a source to the controller; the number that went out."""
    return sum(sender.send(record) for record in source)


def polled(
    poller: PrometheusPoller, every_s: float, stop: Callable[[], bool] = lambda: False
) -> Iterator[EngineRecord]:
    """Poll at a fixed rate until told to stop."""
    due = time.monotonic()
    while not stop():
        yield poller.poll()
        due += every_s
        time.sleep(max(due - time.monotonic(), 0.0))
