"""Downloading public traces into the user's cache.

Streamed, resumed where broken off, checked by SHA-256 where that is known.
"""

import contextlib
import hashlib
import http.client
import urllib.error
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from biscale_env.config import configs_dir, load_yaml
from biscale_env.config.loader import Config
from biscale_env.core import user_cache
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import lock
from biscale_env.traces.partial_file import PartialFile, Progress
from biscale_env.traces.reading.readers import iter_trace
from biscale_env.traces.synthetic.profiles import DOWNLOADS, FOLDER

READABLE_S = 1.0  # of a file without a known digest, the window that must be readable


class Download(Config):
    """One public file.

    Attributes:
        url: public address.
        size_bytes: size of the file; None where it is not known.
        sha256: hex digest of the file; None where it is not known.
        requests: number of requests in it.
        citation: whom to cite, and the licence.
    """

    url: str
    size_bytes: int | None = Field(default=None, gt=0)
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
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

    Its size is compared here where it is known, its digest when it was fetched.

    Raises:
        BiscaleError: no such public trace.
    """
    download = _download(name)
    path = cache_dir() / download.filename
    if not path.is_file() or path.stat().st_size != (download.size_bytes or path.stat().st_size):
        return None
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(name: str, base_url: str | None = None, progress: Progress | None = None) -> Path:
    """Download one public trace, unless the cache holds it already, and return its path.

    The download grows beside its target in pieces of a megabyte, and is moved there only once it is
    whole and its SHA-256 is right (where that is known; else it must be readable as a trace). A
    download that broke off is continued by the next call, if the server still has the same file.

    Args:
        name: name of the trace, as in ``configs/traces/downloads.yaml``.
        base_url: fetch from this address instead, followed by the name of the file (a mirror, or a
            test).
        progress: told about the bytes at hand.

    Raises:
        BiscaleError: unknown name, no connection, an HTTP error, a connection that broke off, a
            wrong checksum (the file is deleted), or a cache that cannot be written or is too small.
    """
    download = _download(name)
    target = cache_dir() / download.filename
    if cached_path(name) and download.sha256 in (None, _digest(target)):
        return target
    url = f"{base_url.rstrip('/')}/{download.filename}" if base_url else download.url
    if not url.startswith(("https://", "http://")):
        raise BiscaleError(f"cannot fetch {url}: the address must start with https:// or http://")
    part = PartialFile(target)
    with _one_sentence(url, target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        # beside the folder of traces, since a lock file stays
        with lock(target.parent.with_name(f"fetch-{name}.lock"), what=f"the download of {name}"):
            part.receive(url, download.size_bytes, progress or (lambda done, total: None))
            _check(url, part, download)
            part.finish()
    return target


@contextlib.contextmanager
def _one_sentence(url: str, folder: Path) -> Iterator[None]:
    """Whatever a download raises becomes one sentence."""
    try:
        yield
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
            f"cannot write to the cache {folder}: {error.strerror or error}"
        ) from None


def _check(url: str, part: PartialFile, download: Download) -> None:
    size, total = part.path.stat().st_size, download.size_bytes or part.total_bytes
    if total is not None and size < total:
        raise BiscaleError(
            f"the download of {url} broke off after {size} of {total} bytes; run it again to "
            "continue"
        )
    if download.sha256 is None:
        _check_readable(url, part)
        return
    digest = _digest(part.path)
    if digest != download.sha256:
        part.delete()
        raise BiscaleError(
            f"{url} is not the expected file: SHA-256 {digest} instead of {download.sha256}; "
            "deleted"
        )


def _check_readable(url: str, part: PartialFile) -> None:
    """Refuse what is no trace, such as a page of a proxy."""
    try:
        next(iter_trace(part.path, READABLE_S))
    except BiscaleError as error:
        part.delete()
        raise BiscaleError(f"{url} is no trace ({error}); deleted") from None
