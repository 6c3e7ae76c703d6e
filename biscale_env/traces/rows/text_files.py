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
NOT_TEXT: Final = {
    b"PK\x03\x04": "a zip archive or a workbook",
    b"\xd0\xcf\x11\xe0": "a workbook",
    b"7z\xbc\xaf": "an archive",
    b"Rar!": "an archive",
    b"ARROW1": "an Arrow (Feather) file",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "a database",
}
TAR: Final = (257, b"ustar")  # where a tar archive says that it is one
UTF16: Final = (b"\xff\xfe", b"\xfe\xff")
UTF8_MARK: Final = b"\xef\xbb\xbf"
UTF8: Final = "utf-8-sig"
SAMPLE_BYTES: Final = 64
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


def encoding_of(head: bytes) -> str:
    """Encoding of a text by its first bytes: UTF-8, or UTF-16 or 32 with a mark or without.

    What is not UTF-8 is known by its zeros: names of columns are plain letters.
    """
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head[:2] in UTF16:
        return "utf-16"
    start = head[: min(SAMPLE_BYTES, len(head) // 4 * 4)]
    zeros = [bool(start) and not any(start[k::4]) for k in range(4)]
    if sum(zeros) == 3:
        return "utf-32-le" if not zeros[0] else "utf-32-be"
    if zeros in ([False, True, False, True], [True, False, True, False]):
        return "utf-16-be" if zeros[0] else "utf-16-le"
    return UTF8


@contextmanager
def open_text(path: Path, errors: str = "strict") -> Iterator[IO[str]]:
    """The text, decoded and without a byte order mark; line ends are kept.

    Args:
        path: the file.
        errors: what becomes of bytes that are no text, as for `open`.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no text.
    """
    with open_bytes(path) as stream:
        raw = io.BufferedReader(_Readable(stream))
        encoding = encoding_of(raw.peek(SAMPLE_BYTES)[:SAMPLE_BYTES])
        yield io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline="")


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
    if text[TAR[0] :].startswith(TAR[1]):
        raise BiscaleError(f"{path} is a tar archive: unpack it")
    if (encoding := encoding_of(text)) != UTF8:
        text = text.decode(encoding, errors="ignore").encode()
    start = text.removeprefix(UTF8_MARK).lstrip()
    if start[:1] == b"{" or (start[:1] == b"[" and named != "csv"):
        return "jsonl"
    return named or "csv"
