"""Clocks through the Zeus daemon: for users who are not root where an administrator runs ``zeusd``.

``zeusd`` (0.5) takes requests over HTTP on a Unix socket; clocks are written through it and read
through NVML, which needs no privilege. The daemon itself never resets a clock, so all promises are
kept by our actuator as with NVML. It serves the requests of one GPU in order, so a reset that
follows a lock whose answer never came is carried out after it.
"""

import http.client
import os
import socket
from collections.abc import Sequence
from urllib.parse import urlencode

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks.backend import ClockBackend, ClockDenied, ClockError
from biscale_env.hardware.clocks.reads_through import ReadsThrough

TIMEOUT_S = 1.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


class ZeusdBackend(ReadsThrough):
    """Writes through ``zeusd``, reads through ``reader``."""

    name = "zeusd"

    def __init__(self, reader: ClockBackend, socket_path: str | None = None) -> None:
        """Connect.

        Args:
            reader: backend that readings come from; NVML on real GPUs.
            socket_path: the daemon's socket; default ``$ZEUSD_SOCK_PATH``, else
                ``/var/run/zeusd.sock``.

        Raises:
            BiscaleError: nobody answers at the socket.
        """
        super().__init__(reader)
        self.socket_path = socket_path or os.environ.get("ZEUSD_SOCK_PATH") or "/var/run/zeusd.sock"
        self._connection = _UnixConnection(self.socket_path)
        try:
            self._connection.connect()
        except OSError as error:
            raise BiscaleError(
                f"zeusd does not answer at {self.socket_path} ({error.strerror or error}): "
                "start it, or set ZEUSD_SOCK_PATH"
            ) from None

    def _post(self, route: str, params: dict[str, str]) -> None:
        token = os.environ.get("ZEUSD_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        target = f"/gpu/{route}?{urlencode(params)}"
        for attempt in (0, 1):  # the daemon closes idle connections: one fresh attempt
            try:
                self._connection.request("POST", target, headers=headers)
                response = self._connection.getresponse()
                body = response.read().decode(errors="replace").strip()
                break
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                # after a time-out the daemon may still carry the request out: not asked twice
                if attempt or isinstance(error, TimeoutError):
                    raise ClockError(
                        f"zeusd at {self.socket_path} does not answer ({error})"
                    ) from None
        if response.status in (401, 403):
            raise ClockDenied(
                f"zeusd refuses {route} ({body or response.status}): "
                "set ZEUSD_TOKEN to a token that allows it"
            )
        if response.status != 200:
            raise ClockError(
                f"zeusd could not {route} ({response.status}: {body or 'no explanation'})"
            )

    def _ids(self, uuids: Sequence[str]) -> str:
        return ",".join(str(self.device(uuid).index) for uuid in uuids)

    def lock(self, uuid: str, low_mhz: float, high_mhz: float) -> None:
        """Ask the daemon to lock, and wait until it has."""
        self.lock_all([uuid], low_mhz, high_mhz)

    def lock_each(
        self, uuids: Sequence[str], low_mhz: float, high_mhz: float
    ) -> dict[str, ClockError]:
        """Ask the daemon to lock several GPUs in one request.

        Its answer is about all of them: a refusal counts for each.
        """
        clocks = {"min_clock_mhz": str(round(low_mhz)), "max_clock_mhz": str(round(high_mhz))}
        try:
            ids = self._ids(uuids)
            self._post("set_gpu_locked_clocks", {"gpu_ids": ids, **clocks, "block": "true"})
        except ClockError as error:
            return dict.fromkeys(uuids, error)
        return {}

    def reset(self, uuid: str) -> None:
        """Ask the daemon to unlock, and wait until it has."""
        self._post("reset_gpu_locked_clocks", {"gpu_ids": self._ids([uuid]), "block": "true"})

    def close(self) -> None:
        """Close the connection and the reader."""
        self._connection.close()
        super().close()
