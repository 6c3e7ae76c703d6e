"""How an engine is asked over HTTP: its address, its key, and answers that end in time."""

import http.client
import time
import urllib.request

from biscale_env.core.errors import BiscaleError

KEY_HINT = "give its key with --api-key or in OPENAI_API_KEY"
PIECE_BYTES = 1 << 16


def base_url(url: str) -> str:
    """Address of an engine without the ``/v1`` that clients of OpenAI are given."""
    return url.rstrip("/").removesuffix("/v1")


def key_headers(api_key: str | None) -> dict[str, str]:
    """Header that carries the key; none without a key.

    Raises:
        BiscaleError: the key holds what no header can carry.
    """
    key = (api_key or "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise BiscaleError("the API key holds characters that no HTTP header can carry")
    return {"Authorization": f"Bearer {key}"}


def read_url(url: str, timeout_s: float, api_key: str | None = None) -> str:
    """Text at an address, whole within ``timeout_s``, however slowly it trickles.

    Raises:
        OSError: no answer, none in time (:class:`TimeoutError`), or one that is no success
            (:class:`urllib.error.HTTPError`).
        ValueError: the address makes no sense.
    """
    deadline = time.monotonic() + timeout_s
    request = urllib.request.Request(url, headers=key_headers(api_key))
    pieces = []
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            while piece := answer.read1(PIECE_BYTES):
                pieces.append(piece)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer within {timeout_s:g} s")
            if answer.length:
                raise OSError(f"the answer broke off {answer.length} bytes before its end")
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP, {type(error).__name__}: {error}".rstrip(": ")) from None
    return b"".join(pieces).decode(errors="replace")
