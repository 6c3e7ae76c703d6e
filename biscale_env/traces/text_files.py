"""Text files as they are found: compressed in several ways, with byte order marks of several kinds.

What a file is follows from its first bytes; its name only helps where they leave it open.
"""

import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, Literal

import pyarrow as pa

from biscale_env.core.errors import BiscaleError

FileFormat = Literal["csv", "jsonl", "parquet"]
SUFFIXES: Final[dict[str, FileFormat]] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
MAGIC: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
COMPRESSED: Final = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz", ".lz4": "lz4"}
NOT_TEXT: Final = {b"PK\x03\x04": "a zip archive or a workbook", b"\xd0\xcf\x11\xe0": "a workbook"}
UTF16: Final = (b"\xff\xfe", b"\xfe\xff")
UTF8_MARK: Final = b"\xef\xbb\xbf"
HEAD_BYTES: Final = 4096


def compression_of(path: Path, head: bytes) -> str | None:
    """How a file is compressed, by its first bytes.

    Raises:
        BiscaleError: the name promises a compression that is not there, or it is an archive.
    """
    for magic, what in NOT_TEXT.items():
        if head.startswith(magic):
            raise BiscaleError(f"{path} is {what}: unpack it, or save the trace as CSV")
    found = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
    named = COMPRESSED.get(path.suffix.lower())
    if named and found is None:
        raise BiscaleError(
            f"cannot read {path}: its name says {named}, but it is not compressed so; rename it"
        )
    return found


@contextmanager
def open_bytes(path: Path) -> Iterator[Any]:
    """A stream of the uncompressed bytes, which pyarrow's readers take.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        kind = compression_of(path, file.read(HEAD_BYTES))
    if kind == "xz":
        with lzma.open(path) as unpacked:
            yield pa.PythonFile(unpacked, mode="r")
        return
    with pa.input_stream(str(path), compression=kind) as stream:
        yield stream


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """The text, decoded and without a byte order mark; line ends are kept.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no text.
    """
    with open_bytes(path) as stream:
        raw = io.BufferedReader(_Readable(stream))
        mark = raw.peek(4)[:3]
        encoding = "utf-16" if mark[:2] in UTF16 else "utf-8-sig"
        yield io.TextIOWrapper(raw, encoding=encoding, newline="")


class _Readable(io.RawIOBase):
    """A pyarrow stream as Python's buffered readers want it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def first_bytes(path: Path) -> bytes:
    """The first uncompressed bytes.

    Raises:
        OSError: it cannot be read.
    """
    with open_bytes(path) as stream:
        return bytes(stream.read(HEAD_BYTES))


def text_format(path: Path, head: bytes) -> FileFormat:
    """Format of a file by what is in it, and by its name where that leaves it open.

    Args:
        path: the file.
        head: its first bytes as they are on the disk.

    Raises:
        BiscaleError: see `compression_of`.
        OSError: it cannot be read.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = compression_of(path, head)
    if packed and suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    named = SUFFIXES.get(suffixes[-1]) if suffixes else None
    if named == "parquet":
        return "parquet"
    text = first_bytes(path) if packed else head
    if text[:2] in UTF16:
        text = text.decode("utf-16", errors="ignore").encode()
    start = text.removeprefix(UTF8_MARK).lstrip()
    if start[:1] == b"{" or (start[:1] == b"[" and named != "csv"):
        return "jsonl"
    return named or "csv"
