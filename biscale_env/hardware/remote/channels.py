"""TCP sockets between machines: authenticated both ways, quick to notice a dead network.

Nothing listens beyond loopback without keys. Connections send heartbeats, so that one that a
partition has cut is given up within :data:`DEAD_AFTER_MS` and made anew, instead of waiting for
TCP's growing pauses.
"""

import ipaddress
import logging
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.remote.keyring import Keyring

HEARTBEAT_MS = 250
DEAD_AFTER_MS = 1000
RECONNECT_MS = (100, 1000)  # first pause and longest, before a connection is tried again
FAILED_HANDSHAKES: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "its key is of no machine of this deployment",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "it has no key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "it takes this machine for another one, or has no key",
}


def host_of(endpoint: str) -> str:
    """Host of a ``tcp://host:port`` address.

    Raises:
        BiscaleError: the address has another form.
    """
    try:
        parts = urlsplit(endpoint)
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None:
            return parts.hostname
    except ValueError:
        pass
    raise BiscaleError(f"'{endpoint}' is no address: write tcp://HOST:PORT")


def is_loopback(host: str) -> bool:
    """Whether a host name or address never leaves this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def take(socket: zmq.Socket) -> bytes | None:
    """The next message; None: there is none.

    A socket that authenticates its callers says now and then that it has a message when it has not
    (libzmq 4.3, at a connection's first heartbeat): what polling says is never relied on.
    """
    frames = take_frames(socket)
    return None if frames is None else frames[-1]


def take_frames(socket: zmq.Socket) -> list[bytes] | None:
    """The frames of the next message; None: there is none, see :func:`take`."""
    try:
        return socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None


class _Gate:
    """Lets machines of the deployment in; what ZAP asks about every handshake."""

    def __init__(self, keys: Keyring) -> None:
        self.keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a public key belongs to the deployment."""
        return self.keys.name_of(key) is not None


class Channels:
    """The TCP sockets of one process, in a context of their own."""

    def __init__(self, keys: Keyring | None) -> None:
        """Start; without keys only loopback addresses can be opened.

        Args:
            keys: of this machine.
        """
        self.keys = keys
        self.context = zmq.Context()
        self._monitors: list[tuple[str, zmq.Socket]] = []
        self._gate: ThreadAuthenticator | None = None
        if keys is not None:
            quiet = logging.getLogger("biscale.zap")
            quiet.setLevel(logging.CRITICAL)  # refusals are told by ``refusals``
            self._gate = ThreadAuthenticator(self.context, log=quiet)
            self._gate.start()
            self._gate.configure_curve_callback("*", credentials_provider=_Gate(keys))

    def bind(self, kind: int, endpoint: str, newest: bool = False) -> zmq.Socket:
        """A socket that listens.

        Args:
            kind: ``zmq.PULL``, ``zmq.PUB``, ...
            endpoint: address.
            newest: keep the newest message only.

        Raises:
            BiscaleError: beyond loopback without keys, or the address cannot be had.
        """
        host = host_of(endpoint)
        if self.keys is None and not is_loopback(host):
            raise BiscaleError(
                f"nothing listens at {endpoint} without keys: make them with `biscale hw keys`, "
                "or use a loopback address"
            )
        socket = self._socket(kind, newest)
        if self.keys is not None:
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = self.keys.public, self.keys.secret
            events = 0
            for event in FAILED_HANDSHAKES:
                events |= event
            self._monitors.append((endpoint, socket.get_monitor_socket(events)))
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise BiscaleError(f"cannot listen at {endpoint}: {error.strerror}") from None
        return socket

    def connect(
        self,
        kind: int,
        endpoint: str,
        peer: str | None,
        newest: bool = False,
        topics: Sequence[bytes] = (b"",),
    ) -> zmq.Socket:
        """A socket that calls another machine and goes on trying while nobody answers.

        Args:
            kind: ``zmq.PUSH``, ``zmq.SUB``, ...
            endpoint: address.
            peer: machine that must answer there; needed with keys.
            newest: keep the newest message only.
            topics: what a SUB socket wants; everything.

        Raises:
            BiscaleError: beyond loopback without keys, an unknown machine, or no address.
        """
        host = host_of(endpoint)
        if self.keys is None and not is_loopback(host):
            raise BiscaleError(
                f"{endpoint} is not called without keys: make them with `biscale hw keys`"
            )
        socket = self._socket(kind, newest)
        if self.keys is not None:
            socket.curve_serverkey = self.keys.public_of(peer or "")
            socket.curve_publickey, socket.curve_secretkey = self.keys.public, self.keys.secret
        for topic in topics if kind == zmq.SUB else ():
            socket.setsockopt(zmq.SUBSCRIBE, topic)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise BiscaleError(f"cannot call {endpoint}: {error.strerror}") from None
        return socket

    def _socket(self, kind: int, newest: bool) -> zmq.Socket:
        socket = self.context.socket(kind)
        options = {
            zmq.LINGER: 0,
            # no bound: libzmq 4.3 ends the process (assertion !_io_error) when a connection breaks
            # whose messages had to wait; senders drop or keep the newest only
            zmq.RCVHWM: 0,
            zmq.HEARTBEAT_IVL: HEARTBEAT_MS,
            zmq.HEARTBEAT_TIMEOUT: DEAD_AFTER_MS,
            zmq.RECONNECT_IVL: RECONNECT_MS[0],
            zmq.RECONNECT_IVL_MAX: RECONNECT_MS[1],
            zmq.CONNECT_TIMEOUT: DEAD_AFTER_MS,
            zmq.HANDSHAKE_IVL: 5 * DEAD_AFTER_MS,
        }
        if newest:
            options |= {zmq.CONFLATE: 1}
        for option, value in options.items():
            socket.setsockopt(option, value)
        return socket

    def refusals(self) -> Iterator[str]:
        """Sentences about callers that were turned away since the last look."""
        for endpoint, monitor in self._monitors:
            while monitor.poll(0):
                event = recv_monitor_message(monitor)["event"]
                why = FAILED_HANDSHAKES.get(event, "the handshake failed")
                yield f"a caller at {endpoint} was turned away: {why}"

    def close(self) -> None:
        """Close everything; may be called again."""
        if self._gate is not None:
            self._gate.stop()
            self._gate = None
        self._monitors.clear()
        self.context.destroy(0)
