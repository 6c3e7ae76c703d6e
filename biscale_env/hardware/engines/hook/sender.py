"""The engine's end of the wire: sends records, never waits, never raises."""

import os
import threading
import time

import zmq

from .curve import is_tcp, next_port, prepare_call
from .engine_record import EngineRecord, encode
from .guard import MAX_FAILURES

# where the controller listens, e.g. ipc:///tmp/biscale/record-prefill.sock
NEWEST_VARIABLE = "BISCALE_RECORDS"
# where every record is published for recorders, e.g. ipc:///tmp/biscale/all-prefill.sock
ALL_VARIABLE = "BISCALE_RECORDS_ALL"
# the same two for the stat logger: variables of its own, so that it never doubles the scheduler
# hook
STATS_VARIABLE, STATS_ALL_VARIABLE = "BISCALE_STATS", "BISCALE_STATS_ALL"
HEARTBEAT_S = 0.25


def alive_endpoint(endpoint: str) -> str:
    """Address of the heartbeats that go with an address of records; over TCP the next port."""
    return next_port(endpoint) if is_tcp(endpoint) else f"{endpoint}.alive"


class Sender:
    """Sends each record to the controller, which only ever sees the newest, and to recorders.

    A thread tells the controller every quarter of a second that the engine's process lives, so that
    an idle engine is not taken for a dead one, and a dead one not for idle. Heartbeats end with the
    records: after :meth:`close` and after too many failures the lease of the clock runs out.

    Attributes:
        sent: records that went out.
        failures: failures in a row.
        dead: nothing is sent any more.
    """

    def __init__(
        self,
        newest: str | None,
        publish: str | None = None,
        heartbeat_s: float | None = HEARTBEAT_S,
    ) -> None:
        """Connect.

        Args:
            newest: address of the controller; None sends nothing.
            publish: address to publish all records at (this side binds); None publishes nothing.
            heartbeat_s: time between heartbeats, s; None sends none, where this process says
                nothing about the engine's life.
        """
        self.sent = 0
        self.failures = 0
        self.dead = False
        self._context: zmq.Context | None = None
        self._newest: zmq.Socket | None = None
        self._all: zmq.Socket | None = None
        self._stop = threading.Event()
        if newest or publish:
            self._open(newest, publish, heartbeat_s)

    @classmethod
    def from_environment(
        cls, newest: str = NEWEST_VARIABLE, publish: str = ALL_VARIABLE
    ) -> "Sender":
        """Sender to the addresses in these environment variables; silent without them."""
        return cls(os.environ.get(newest), os.environ.get(publish))

    @property
    def active(self) -> bool:
        """Whether sending has a purpose."""
        return not self.dead and (self._newest is not None or self._all is not None)

    def _open(self, newest: str | None, publish: str | None, heartbeat_s: float | None) -> None:
        try:
            self._context = zmq.Context()
            if newest:
                self._newest = self._pusher(newest)
                if heartbeat_s is not None:
                    args = (alive_endpoint(newest), heartbeat_s)
                    threading.Thread(
                        target=self._beat, args=args, daemon=True, name="biscale-heartbeat"
                    ).start()
            if publish:
                self._all = self._context.socket(zmq.PUB)
                self._all.setsockopt(zmq.LINGER, 0)
                self._all.bind(publish)
        except Exception:
            self.dead = True

    def _pusher(self, endpoint: str) -> zmq.Socket:
        assert self._context is not None
        socket = self._context.socket(zmq.PUSH)
        for option, value in ((zmq.SNDHWM, 1), (zmq.CONFLATE, 1), (zmq.LINGER, 0)):
            socket.setsockopt(option, value)
        if is_tcp(endpoint):
            prepare_call(socket, endpoint)
        socket.connect(endpoint)
        return socket

    def _beat(self, endpoint: str, heartbeat_s: float) -> None:
        try:
            socket = self._pusher(endpoint)
            while not self._stop.wait(heartbeat_s):
                try:
                    socket.send(b"%.6f" % time.monotonic(), zmq.NOBLOCK)
                except zmq.Again:
                    continue
            socket.close(0)
        except Exception:
            self.dead = True

    def send(self, record: EngineRecord) -> bool:
        """Send if it costs no waiting; True when it went out somewhere. Never raises."""
        if not self.active:
            return False
        try:
            data = encode(record)
            went = self._give(self._newest, data) | self._give(self._all, data)
            self.sent += went
            self.failures = 0
            return went
        except Exception:
            self.failures += 1
            if self.failures >= MAX_FAILURES:
                self.close()
            return False

    @staticmethod
    def _give(socket: zmq.Socket | None, data: bytes) -> bool:
        if socket is None:
            return False
        try:
            socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """Stop the heartbeat and close the sockets; may be called again."""
        self._stop.set()
        self.dead = True
        for socket in (self._newest, self._all):
            if socket is not None:
                socket.close(0)
