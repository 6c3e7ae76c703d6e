"""Records over TCP: authenticated with CurveZMQ keys, never beyond loopback without them.

``BISCALE_KEYS`` is the folder of this machine's keys (``biscale hw keys``), ``BISCALE_KEYS_PEER``
the machine whose controller takes the records.
"""

import ipaddress
import os
from pathlib import Path
from urllib.parse import urlsplit

import zmq
import zmq.auth

KEYS_VARIABLE, PEER_VARIABLE = "BISCALE_KEYS", "BISCALE_KEYS_PEER"
HEARTBEAT_MS, DEAD_AFTER_MS, RECONNECT_MS = 250, 1000, (100, 1000)


def is_tcp(endpoint: str) -> bool:
    """Whether an address leaves the file system."""
    return endpoint.startswith("tcp://")


def next_port(endpoint: str) -> str:
    """The TCP address one port further.

    Raises:
        ValueError: the address has no port.
    """
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + 1}"


def prepare_call(socket: zmq.Socket, endpoint: str) -> None:
    """Make a socket ready to call a TCP address: keys, and quick notice of a dead network.

    Raises:
        ValueError: beyond loopback without keys.
        OSError: the keys cannot be read.
    """
    for option, value in (
        (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
        (zmq.HEARTBEAT_TIMEOUT, DEAD_AFTER_MS),
        (zmq.CONNECT_TIMEOUT, DEAD_AFTER_MS),
        (zmq.RECONNECT_IVL, RECONNECT_MS[0]),
        (zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1]),
    ):
        socket.setsockopt(option, value)
    folder = os.environ.get(KEYS_VARIABLE)
    if folder is None:
        host = urlsplit(endpoint).hostname or ""
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise ValueError(f"{endpoint} is not called without keys: set {KEYS_VARIABLE}")
        return
    public, secret = zmq.auth.load_certificate(Path(folder) / "own.key_secret")
    peer = Path(folder) / "peers" / f"{os.environ.get(PEER_VARIABLE, '')}.key"
    socket.curve_serverkey, _ = zmq.auth.load_certificate(peer)
    socket.curve_publickey, socket.curve_secretkey = public, secret
