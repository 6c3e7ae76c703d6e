"""The zeusd backend against a small server that speaks the daemon's routes on a Unix socket."""

import http.server
import os
import socketserver
import threading
import time
from urllib.parse import parse_qs, urlsplit

import pytest

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks import zeusd
from biscale_env.hardware.clocks.backend import ClockDenied, ClockError
from biscale_env.hardware.clocks.fake_gpus import FakeBackend, create_state
from biscale_env.hardware.clocks.zeusd import ZeusdBackend


class Daemon(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        parts = urlsplit(self.path)
        self.server.seen.append(
            (
                parts.path,
                {k: v[0] for k, v in parse_qs(parts.query).items()},
                self.headers.get("Authorization"),
            )
        )
        time.sleep(self.server.delay_s)
        body = self.server.body.encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.server.hang_up:
            self.close_connection = True

    def address_string(self):
        return "local"

    def log_message(self, *args):
        pass


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the test


@pytest.fixture
def daemon(tmp_path):
    with Server(str(tmp_path / "z.sock"), Daemon) as server:
        server.seen, server.status, server.body, server.hang_up = [], 200, "", False
        server.delay_s = 0.0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.path = str(tmp_path / "z.sock")
        yield server
        server.shutdown()


@pytest.fixture
def reader(tmp_path):
    return FakeBackend(create_state(tmp_path / "gpus", 4))


def test_locks_a_whole_group_in_one_request(daemon, reader, monkeypatch):
    monkeypatch.setenv("ZEUSD_TOKEN", "secret")
    backend = ZeusdBackend(reader, daemon.path)
    uuids = [d.uuid for d in reader.devices()][1:3]
    backend.lock_all(uuids, 900.0, 1200.0)
    backend.reset(uuids[0])
    assert daemon.seen == [
        (
            "/gpu/set_gpu_locked_clocks",
            {"gpu_ids": "1,2", "min_clock_mhz": "900", "max_clock_mhz": "1200", "block": "true"},
            "Bearer secret",
        ),
        ("/gpu/reset_gpu_locked_clocks", {"gpu_ids": "1", "block": "true"}, "Bearer secret"),
    ]
    assert backend.read(uuids[0]).freq_mhz == 1980.0
    backend.close()


def test_a_connection_closed_by_the_daemon_is_opened_again(daemon, reader):
    daemon.hang_up = True
    backend = ZeusdBackend(reader, daemon.path)
    for _ in range(3):
        backend.reset(reader.devices()[0].uuid)
    assert len(daemon.seen) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [(403, ClockDenied, "ZEUSD_TOKEN"), (400, ClockError, "400: bad clock")],
)
def test_refusals(daemon, reader, status, kind, words):
    daemon.status, daemon.body = status, "bad clock"
    backend = ZeusdBackend(reader, daemon.path)
    with pytest.raises(kind, match=words):
        backend.lock(reader.devices()[0].uuid, 900.0, 900.0)


def test_a_lock_whose_answer_never_came_is_not_asked_for_twice(daemon, reader, monkeypatch):
    """The daemon may still carry it out; the reset afterwards is served behind it."""
    monkeypatch.setattr(zeusd, "TIMEOUT_S", 0.1)
    daemon.delay_s = 0.4
    backend = ZeusdBackend(reader, daemon.path)
    uuids = [d.uuid for d in reader.devices()][:2]
    failures = backend.lock_each(uuids, 900.0, 900.0)
    assert sorted(failures) == sorted(uuids)  # the one answer is about both
    assert "does not answer" in str(failures[uuids[0]])
    daemon.delay_s = 0.0
    assert backend.reset_each(uuids) == {}
    assert [path.rsplit("/", 1)[1] for path, *_ in daemon.seen] == [
        "set_gpu_locked_clocks",
        "reset_gpu_locked_clocks",
        "reset_gpu_locked_clocks",
    ]


def test_nobody_at_the_socket(tmp_path, reader):
    with pytest.raises(BiscaleError, match=r"nothing\.sock.*start it"):
        ZeusdBackend(reader, str(tmp_path / "nothing.sock"))
    assert not os.path.exists(tmp_path / "nothing.sock")
