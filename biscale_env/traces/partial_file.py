"""A download that grows on the disk, and goes on where it broke off."""

import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from http import HTTPStatus
from pathlib import Path
from typing import Final

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole

CHUNK_BYTES: Final = 1 << 20
TIMEOUT_S: Final = 30.0

Progress = Callable[[int, int | None], None]
"""Called with the bytes at hand and the bytes in all (None: the server does not say)."""


class PartialFile:
    """The beginning of a file, beside its place.

    The server's mark of the version (ETag, or the date of change) is kept beside it, so that two
    halves of different files are never put together.

    Attributes:
        path: what is at hand, ``<target>.part``.
        total_bytes: size of the whole file as the server says; None where it does not.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self.path = target.with_name(target.name + ".part")
        self._mark = target.with_name(target.name + ".part-version")
        self.total_bytes: int | None = None

    def receive(self, url: str, size_bytes: int | None, progress: Progress) -> None:
        """Fill up, from where it ends if the server can do so.

        Bytes beyond the expected size are not stored.

        Args:
            url: where from.
            size_bytes: expected size; None where it is not known.
            progress: told about the bytes at hand.

        Raises:
            OSError: no connection, an HTTP error, or the disk.
            BiscaleError: the disk has too little room.
        """
        done = self.path.stat().st_size if self.path.exists() else 0
        if done and done == size_bytes:
            return
        version = self._mark.read_text() if self._mark.exists() else ""
        # without a known size (and so a digest) or a version nobody could tell two files apart
        if done > (size_bytes or done) or (size_bytes is None and not version):
            self.delete()
            done = 0
        request = urllib.request.Request(url, headers={"User-Agent": "biscale-env"})
        if done:
            request.add_header("Range", f"bytes={done}-")
            if version:
                request.add_header("If-Range", version)
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not done:
                raise
            if _total(error.headers) == done:  # it is whole already
                self.total_bytes = done
                return
            self.delete()
            self.receive(url, size_bytes, progress)
            return
        with response:
            self._store(response, done, size_bytes, progress)

    def _store(
        self,
        response: http.client.HTTPResponse,
        done: int,
        size_bytes: int | None,
        progress: Progress,
    ) -> None:
        continues = response.status == HTTPStatus.PARTIAL_CONTENT
        done = done if continues else 0
        self.total_bytes = _total(response.headers)
        if self.total_bytes is None and response.headers.get("Content-Length"):
            self.total_bytes = done + int(response.headers["Content-Length"])
        total = size_bytes or self.total_bytes
        self._need_room((total or 0) - done)
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if version and not version.startswith("W/"):  # weak marks do not hold for ranges
            write_whole(self._mark, version)
        with self.path.open("ab" if continues else "wb") as file:
            progress(done, total)
            for chunk in _chunks(response):
                file.write(chunk)
                done += len(chunk)
                progress(done, total)
                if done > (size_bytes or done):
                    break

    def _need_room(self, more_bytes: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if more_bytes > free:
            raise BiscaleError(
                f"the cache {self.path.parent} has {free / 1e6:,.0f} MB left, but {self.path.stem} "
                f"needs {more_bytes / 1e6:,.0f} MB more"
            )

    def finish(self) -> None:
        """Move the whole file to its place."""
        os.replace(self.path, self._target)
        self._mark.unlink(missing_ok=True)

    def delete(self) -> None:
        """Forget what is at hand."""
        self.path.unlink(missing_ok=True)
        self._mark.unlink(missing_ok=True)


def _total(headers: Message) -> int | None:
    """Size of the whole file in ``Content-Range: bytes 0-9/SIZE``."""
    found = re.search(r"/(\d+)$", headers.get("Content-Range") or "")
    return int(found[1]) if found else None


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """What arrives, up to the end or to where the connection broke off."""
    try:
        while chunk := response.read(CHUNK_BYTES):
            yield chunk
    except http.client.IncompleteRead as error:
        yield error.partial
