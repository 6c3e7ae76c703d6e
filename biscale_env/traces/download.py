"""Downloading the public Azure traces into the user's cache.

Resumed where broken off, checked by SHA-256.
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import Field

from biscale_env.config import configs_dir, load_yaml
from biscale_env.config.loader import Config
from biscale_env.core import user_cache
from biscale_env.core.errors import BiscaleError
from biscale_env.traces.synthetic.profiles import DOWNLOADS, FOLDER

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30.0

Progress = Callable[[int, int], None]
"""Called with the bytes at hand and the bytes in all."""


class Download(Config):
    """One public file.

    Attributes:
        url: public address.
        size_bytes: size of the file.
        sha256: hex digest of the file.
        requests: number of requests in it.
        citation: whom to cite, and the licence.
    """

    url: str
    size_bytes: int = Field(gt=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    requests: int = Field(gt=0)
    citation: str

    @property
    def filename(self) -> str:
        """Last part of the address."""
        return self.url.rsplit("/", 1)[-1]


class Downloads(Config):
    """All public files by name, and where their digests come from."""

    checksums_from: str
    files: dict[str, Download]


def load_downloads() -> Downloads:
    """Load the list of public files, ``configs/traces/downloads.yaml``."""
    return load_yaml(configs_dir() / FOLDER / f"{DOWNLOADS}.yaml", Downloads)


def cache_dir() -> Path:
    """Folder of downloaded traces.

    ``$BISCALE_CACHE/traces`` if that is set, else in the user's cache.
    """
    return user_cache.cache_root() / FOLDER


def _download(name: str) -> Download:
    files = load_downloads().files
    if name not in files:
        raise BiscaleError(f"there is no public trace '{name}' to fetch; known: {', '.join(files)}")
    return files[name]


def cached_path(name: str) -> Path | None:
    """Path of a downloaded trace in the cache, or None.

    Its size is compared here, its digest when it was fetched.

    Raises:
        BiscaleError: no such public trace.
    """
    download = _download(name)
    path = cache_dir() / download.filename
    return path if path.is_file() and path.stat().st_size == download.size_bytes else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(name: str, base_url: str | None = None, progress: Progress | None = None) -> Path:
    """Download one public trace, unless the cache holds it already, and return its path.

    The download grows beside its target and is moved there only once its SHA-256 is right; a
    download that broke off is continued by the next call.

    Args:
        name: name of the trace, as in ``configs/traces/downloads.yaml``.
        base_url: fetch from this address instead, followed by the name of the file (a mirror, or a
            test).
        progress: told about the bytes at hand.

    Raises:
        BiscaleError: unknown name, no connection, an HTTP error, a connection that broke off, a
            wrong checksum (the file is deleted), or a cache that cannot be written.
    """
    download = _download(name)
    target = cache_dir() / download.filename
    if cached_path(name) and _digest(target) == download.sha256:
        return target
    url = f"{base_url.rstrip('/')}/{download.filename}" if base_url else download.url
    if not url.startswith(("https://", "http://")):
        raise BiscaleError(f"cannot fetch {url}: the address must start with https:// or http://")
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _receive(url, part, download.size_bytes, progress or (lambda done, total: None))
        _check(url, part, download)
        os.replace(part, target)
    except urllib.error.HTTPError as error:
        raise BiscaleError(
            f"cannot fetch {url}: the server answered {error.code} {error.reason}"
        ) from None
    except urllib.error.URLError as error:
        raise BiscaleError(f"cannot fetch {url}: {error.reason}") from None
    except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise BiscaleError(
            f"the download of {url} broke off ({error}); run it again to continue"
        ) from None
    except OSError as error:
        raise BiscaleError(
            f"cannot write to the cache {target.parent}: {error.strerror or error}"
        ) from None
    return target


def _receive(url: str, part: Path, size_bytes: int, progress: Progress) -> None:
    """Fill ``part`` up, from where it ends if the server can do so.

    Bytes beyond the expected size are not stored.
    """
    done = part.stat().st_size if part.exists() else 0
    if done == size_bytes:
        return
    if done > size_bytes:
        part.unlink()
        done = 0
    request = urllib.request.Request(url, headers={"User-Agent": "biscale-env"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        continues = response.status == http.HTTPStatus.PARTIAL_CONTENT
        done = done if continues else 0
        with part.open("ab" if continues else "wb") as file:
            progress(done, size_bytes)
            for chunk in _chunks(response):
                file.write(chunk)
                done += len(chunk)
                progress(done, size_bytes)
                if done > size_bytes:
                    break


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """What arrives, up to the end or to where the connection broke off."""
    try:
        while chunk := response.read(CHUNK_BYTES):
            yield chunk
    except http.client.IncompleteRead as error:
        yield error.partial


def _check(url: str, part: Path, download: Download) -> None:
    size = part.stat().st_size
    if size < download.size_bytes:
        raise BiscaleError(
            f"the download of {url} broke off after {size} of {download.size_bytes} bytes; run it "
            "again to continue"
        )
    digest = _digest(part)
    if digest != download.sha256:
        part.unlink()
        raise BiscaleError(
            f"{url} is not the expected file: SHA-256 {digest} instead of {download.sha256}; "
            "deleted"
        )
