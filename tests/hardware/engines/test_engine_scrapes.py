"""Metrics as engines really serve them: late, broken off, not a number, by several ranks."""

import http.server
import threading
import time

import pytest

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks.doctor import check_endpoint
from biscale_env.hardware.engines import sources
from biscale_env.hardware.engines.http_access import key_headers, read_url
from biscale_env.hardware.engines.sources import PrometheusPoller, parse_prometheus, polled
from biscale_env.hardware.replay.closed_loop import wait_for_engines

GOOD = "vllm:num_requests_running 3\nvllm:num_requests_waiting 1\n"


class Site(http.server.ThreadingHTTPServer):
    """A loopback site that answers as the test says."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.text, self.status, self.behaviour, self.key = GOOD, 200, "good", None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server
        if site.behaviour == "trickle":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"# slow\n")
                self.wfile.flush()
                time.sleep(0.05)
            return
        if site.behaviour == "no http":
            self.wfile.write(b"\x00\x01nonsense\r\n\r\n")
            return
        denied = site.key and self.headers.get("Authorization") != f"Bearer {site.key}"
        body = site.text.encode()
        self.send_response(401 if denied else site.status)
        length = len(body) + (100 if site.behaviour == "cut" else 0)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def site():
    site = Site()
    yield site
    site.shutdown()
    site.server_close()


def ranks(label, values, name="sglang:num_running_reqs", more=""):
    return "".join(f'{name}{{{label}="{k}"{more}}} {v}\n' for k, v in enumerate(values))


@pytest.mark.parametrize("label", ["tp_rank", "pp_rank", "moe_ep_rank", "rank"])
def test_ranks_that_work_on_the_same_requests_count_once(label):
    assert parse_prometheus(ranks(label, [5, 5, 4, "NaN"])) == {"sglang:num_running_reqs": 5.0}


@pytest.mark.parametrize("label", ["dp_rank", "engine", "model_name"])
def test_ranks_with_requests_of_their_own_are_summed(label):
    name = "vllm:num_requests_running"
    assert parse_prometheus(ranks(label, [5, 2], name)) == {name: 7.0}


def test_data_parallel_ranks_of_tensor_parallel_ones():
    text = "".join(ranks("tp_rank", [dp + 3] * 4, more=f',dp_rank="{dp}"') for dp in range(2))
    assert parse_prometheus(text) == {"sglang:num_running_reqs": 7.0}


def test_a_state_that_is_no_number_is_no_record_and_a_counter_that_is_none_stays(site):
    site.text = GOOD + "vllm:prompt_tokens_total 900\nvllm:request_success_total 9\n"
    poller = PrometheusPoller(site.url)
    assert poller.poll().queued_requests.sum_prefill_tokens == 100
    site.text = GOOD + "vllm:prompt_tokens_total NaN\nvllm:request_success_total 10\n"
    assert poller.poll().queued_requests.sum_prefill_tokens in (0, 100)
    site.text = "vllm:num_requests_running 3\nvllm:num_requests_waiting NaN\n"
    assert poller.poll().queued_requests.num_prefill_requests == 1  # the last that was known
    for broken in ("NaN", "+Inf", "x"):
        site.text = f"vllm:num_requests_running {broken}\n"
        with pytest.raises(BiscaleError, match="no number of running requests"):
            poller.poll()


def test_an_engine_that_counts_anew_does_not_make_lengths_negative(site):
    poller = PrometheusPoller(site.url)
    for tokens, finished in ((900, 9), (50, 10), (1050, 20)):
        site.text = (
            GOOD + f"vllm:prompt_tokens_total {tokens}\nvllm:request_success_total {finished}\n"
        )
        assert poller.poll().queued_requests.sum_prefill_tokens == 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("trickle", "no whole answer within 0.3 s"),
        ("cut", "broke off 100 bytes before its end"),
        ("no http", "no HTTP"),
    ],
)
def test_an_answer_that_never_becomes_whole_ends_in_time(site, behaviour, words):
    site.behaviour = behaviour
    start = time.monotonic()
    with pytest.raises(BiscaleError, match=f"does not answer .*{words}"):
        PrometheusPoller(site.url, timeout_s=0.3).poll()
    assert time.monotonic() - start < 1.0


@pytest.mark.slow
def test_polls_may_fail_for_a_while_and_it_is_said_once(site):
    told = []
    start = time.monotonic()

    def late():
        now = time.monotonic() - start
        site.status = 503 if 0.2 < now < 0.6 else 200
        return now > 1.0

    records = polled(PrometheusPoller(site.url), 0.02, late, 5.0, told.append)
    counts = [record.counter_id for record in records]
    assert counts == list(range(1, len(counts) + 1))
    assert 15 < len(counts) < 40
    assert len(told) == 2
    assert "answers 503; trying again for 5 s" in told[0]
    assert "answers again after" in told[1]


@pytest.mark.slow
def test_polls_that_fail_for_the_stated_time_end_the_bridge(site):
    start = time.monotonic()
    records = polled(PrometheusPoller(site.url), 0.02, give_up_s=0.3)
    next(records)
    site.status = 503
    with pytest.raises(BiscaleError, match=r"answers 503; \d+ polls in a row have failed"):
        next(records)
    assert 0.3 <= time.monotonic() - start < 1.0


def test_a_first_poll_that_fails_is_said_at_once(site):
    site.status = 404
    with pytest.raises(BiscaleError, match=r"answers 404$"):
        next(polled(PrometheusPoller(site.url), 0.02))


def test_polls_do_not_come_in_a_burst_after_a_slow_one(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(sources.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sources.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    took, starts = iter([0.01, 0.9, 0.01, 0.01, 0.01]), []

    class Poller:
        def poll(self):
            starts.append(clock[0])
            clock[0] += next(took)

    records = polled(Poller(), 0.1)
    for _ in range(5):
        next(records)
    assert starts == pytest.approx([0.0, 0.1, 1.0, 1.1, 1.2])


def test_keys_open_metrics_models_and_the_doctor(site):
    site.key = "secret"
    with pytest.raises(BiscaleError, match="answers 401: give its key with --api-key"):
        PrometheusPoller(site.url).poll()
    assert PrometheusPoller(f"{site.url}/v1", api_key=" secret ").poll().counter_id == 1
    assert "answers 401" in check_endpoint(site.url).text
    assert "--api-key" in check_endpoint(site.url).text
    assert check_endpoint(site.url, api_key="secret").status == "ok"
    assert key_headers("") == key_headers(None) == {}


@pytest.mark.slow
def test_waiting_for_an_engine_ends_with_its_answer_also_with_a_refusal(site):
    site.key = "secret"
    start = time.monotonic()
    wait_for_engines([site.url], 20.0)
    assert time.monotonic() - start < 2.0
    site.key, site.status = None, 503  # a proxy whose engine is still starting
    threading.Timer(0.4, setattr, (site, "status", 200)).start()
    start = time.monotonic()
    wait_for_engines([site.url], 20.0)
    assert 0.3 < time.monotonic() - start < 3.0


def test_an_address_without_sense_is_an_error_of_the_user():
    with pytest.raises(ValueError, match="unknown url type"):
        read_url("nonsense", 1.0)
