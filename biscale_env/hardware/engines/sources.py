"""Records from engines without our hook.

Streams of ForwardPassMetrics (Dynamo, SGLang), and Prometheus polling.

Each source is a small process that turns what it hears into records for the controller, as the hook
would send them. What it cannot know (lengths and ages of single requests) the controller estimates.
"""

import math
import time
import urllib.error
from collections.abc import Callable, Iterator

import zmq
from prometheus_client.parser import text_string_to_metric_families

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.engines.hook.engine_record import EngineRecord, Queued, Scheduled, decode
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.hardware.engines.http_access import KEY_HINT, base_url, key_headers, read_url

TIMEOUT_S = 2.0
GIVE_UP_S = 30.0  # as long as a replay waits for an engine that says nothing


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
    """Sum of every metric over models and data-parallel ranks; histograms: ``_sum``, ``_count``.

    Tensor- and pipeline-parallel ranks of one engine report the same requests: the largest counts,
    once. Line by line, so that one that is no sample costs only itself. A sample that is no finite
    number counts nothing.
    """
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for line in text.splitlines():
        if line.startswith("#") or line.partition("{")[0].endswith("_bucket"):
            continue
        try:
            samples = [s for f in text_string_to_metric_families(line + "\n") for s in f.samples]
        except (ValueError, KeyError, IndexError):
            continue
        for sample in samples:
            if math.isfinite(sample.value):
                told = found.setdefault(sample.name, {})
                labels = frozenset(i for i in sample.labels.items() if not _is_replica(i[0]))
                told[labels] = max(told.get(labels, -math.inf), sample.value)
    return {name: sum(told.values()) for name, told in found.items()}


def _is_replica(label: str) -> bool:
    """Whether engines that differ in this label alone work on the same requests.

    SGLang's ``tp_rank``, ``pp_rank``, ``moe_ep_rank``; not ``dp_rank``, nor vLLM's ``engine``.
    """
    return label.endswith("rank") and "dp" not in label


class PrometheusPoller:
    """State between iterations, as old as the polling interval; sums only."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S, api_key: str | None = None) -> None:
        """Prepare.

        Args:
            url: of the engine or of its metrics.
            timeout_s: for one whole answer.
            api_key: of the engine.

        Raises:
            BiscaleError: the key cannot be sent.
        """
        address = url.rstrip("/")
        self.url = address if address.endswith("/metrics") else f"{base_url(address)}/metrics"
        self.timeout_s = timeout_s
        self.counter = 0
        self._key = api_key
        self._last: dict[str, float] = {}
        self._prompt_mean = 0.0
        key_headers(api_key)

    def poll(self) -> EngineRecord:
        """One look at the metrics.

        Raises:
            BiscaleError: no whole answer in time, or not the metrics of vLLM or SGLang.
        """
        try:
            values = parse_prometheus(read_url(self.url, self.timeout_s, self._key))
        except urllib.error.HTTPError as error:
            hint = f": {KEY_HINT}" if error.code in (401, 403) else ""
            raise BiscaleError(f"{self.url} answers {error.code}{hint}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise BiscaleError(f"{self.url} does not answer ({reason})") from None
        for prefix, names in NAMES.items():
            if f"{prefix}:{names['running']}" in values:
                self.counter += 1
                return self._record(
                    {
                        k: values.get(f"{prefix}:{v}", self._last.get(k, 0.0))
                        for k, v in names.items()
                    }
                )
        raise BiscaleError(
            f"{self.url} answers, but without the metrics of vLLM or SGLang "
            "(no number of running requests): is it the engine's address?"
        )

    def _record(self, now: dict[str, float]) -> EngineRecord:
        last, self._last = self._last, now
        prompts = now["finished"] - last.get("finished", 0.0)
        tokens = now["prompt_tokens"] - last.get("prompt_tokens", 0.0)
        if prompts > 0 and tokens >= 0:  # else the engine has begun to count anew
            self._prompt_mean = tokens / prompts
        waiting = max(round(now["waiting"]), 0)
        running = max(round(now["running"]), 0)
        return EngineRecord(
            worker_id=self.url,
            counter_id=self.counter,
            wall_time=0.0,
            scheduled_requests=Scheduled(num_decode_requests=running),
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
    poller: PrometheusPoller,
    every_s: float,
    stop: Callable[[], bool] = lambda: False,
    give_up_s: float = GIVE_UP_S,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[EngineRecord]:
    """Poll at a fixed rate until told to stop.

    A poll that fails yields nothing, so that the lease of the clock runs out when it lasts. The
    first failure of a row is told, and so is the end of the row.

    Args:
        poller: asks.
        every_s: time between polls.
        stop: asked before each.
        give_up_s: how long polls may fail in a row; none may before the first that succeeds.
        tell: called with sentences.

    Raises:
        BiscaleError: the first poll fails, or all have failed for ``give_up_s``.
    """
    due = time.monotonic()
    failed, since_s = 0, -math.inf
    while not stop():
        try:
            record = poller.poll()
        except BiscaleError as error:
            now = time.monotonic()
            since_s = since_s if failed else now
            failed += 1
            if now - since_s >= give_up_s or not poller.counter:
                row = f"; {failed} polls in a row have failed" if failed > 1 else ""
                raise BiscaleError(f"{error}{row}") from None
            if failed == 1:
                tell(f"{error}; trying again for {give_up_s:g} s, no record goes out meanwhile")
        else:
            if failed:
                tell(f"{poller.url} answers again after {failed} failed polls")
            failed = 0
            yield record
        due = max(due + every_s, time.monotonic())
        time.sleep(max(due - time.monotonic(), 0.0))
