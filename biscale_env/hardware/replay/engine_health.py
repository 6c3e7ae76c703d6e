"""When an engine counts as gone in the middle of a replay.

Either :data:`LOST_AFTER` requests in a row found no connection or lost it; or requests are under
way and no byte came from any of them for ``stall_s``; or for ``stall_s`` nobody got a token and
every request that ended, :data:`REFUSED_AFTER` of them at least, was refused (503, 429, an error in
the stream, a stream cut off). A request that times out fails, but says nothing about the engine:
under overload an engine that lives is slow.
"""

import math

import aiohttp

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.replay.answers import RequestRefused

LOST_AFTER = 8  # requests in a row without a connection
REFUSED_AFTER = 3  # requests in a row that were refused, and for stall_s


class EngineGone(BiscaleError):
    """The engine stopped answering midway."""


def lost_connection(error: Exception) -> bool:
    """Whether a request found no connection or lost it; a timeout of any kind is none of these.

    ``TimeoutError`` is an ``OSError``, and aiohttp's own timeouts are connection errors too.
    """
    broken = isinstance(error, aiohttp.ClientConnectionError | OSError)
    return broken and not isinstance(error, TimeoutError)


def described(error: Exception) -> str:
    """Text of a refusal; kind and text of any other error. One line."""
    if isinstance(error, RequestRefused):
        return str(error)
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection was cut in the middle of the answer"
    return " ".join(f"{type(error).__name__}: {error}".strip(": ").split())


class EngineHealth:
    """What the requests of a replay tell about the engine.

    Attributes:
        heard_s: when the newest byte came, s.
        gone: why the engine counts as gone; None while it does not.
    """

    def __init__(self, stall_s: float) -> None:
        """Begin with an engine that lives."""
        self.stall_s = stall_s
        self.heard_s = 0.0
        self.gone: EngineGone | None = None
        self._lost = 0
        self._refused = 0
        self._refused_since_s = math.inf

    def hears(self, now: float) -> None:
        """A byte came."""
        self.heard_s = now

    def served(self) -> None:
        """A request was answered with all its tokens."""
        self._lost = 0
        self._refused, self._refused_since_s = 0, math.inf

    def failed(self, error: Exception, now: float, last_token_s: float = -math.inf) -> None:
        """A request has failed.

        Args:
            error: why.
            now: when, s.
            last_token_s: newest token of any request that is still under way, s.
        """
        if isinstance(error, TimeoutError):
            return
        if lost_connection(error):
            self._lost += 1
        else:
            self._refused += 1
            self._refused_since_s = min(self._refused_since_s, now)
        if self.gone is not None:
            return
        for_s = now - max(self._refused_since_s, last_token_s)
        if self._lost >= LOST_AFTER:
            why = f"{self._lost} requests in a row failed"
        elif self._refused >= REFUSED_AFTER and for_s >= self.stall_s:
            why = f"for {for_s:.0f} s it refused every request, {self._refused} in all"
        else:
            return
        self.gone = EngineGone(f"the engine is gone: {why}, the last with {described(error)}")

    def look(self, under_way: int, now: float) -> None:
        """An engine that hangs keeps its connections open; only silence tells."""
        if not under_way:
            self.heard_s = now
        silent_s = now - self.heard_s
        if silent_s > self.stall_s and self.gone is None:
            self.gone = EngineGone(
                f"the engine stopped answering: {under_way} requests are under way, "
                f"and nothing came for {silent_s:.0f} s"
            )
