"""Where a result comes from.

Command line, source revision, package versions, digests of inputs, seeds, time.
"""

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = (
    "biscale-env",
    "numpy",
    "scipy",
    "numba",
    "pandas",
    "pyarrow",
    "casadi",
    "do-mpc",
    "gymnasium",
)
_GIT_SECONDS: Final = 5


def git_revision(folder: Path | None = None) -> str | None:
    """Revision of the checkout the package runs from, with ``+changes`` when it has been edited.

    None outside one.
    """
    root = folder or Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if dirty else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS
    ).stdout.strip()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def text_hash(text: str) -> str:
    """SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def provenance(
    *, inputs: Mapping[str, str] | None = None, seeds: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that is needed to make the same run again, as plain data.

    Args:
        inputs: SHA-256 of what went in (traces, models, checkpoints), by its name in a sentence.
        seeds: seeds that the comparison was made with.
    """
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "sha256": dict(inputs or {}),
        "seeds": dict(seeds or {}),
    }
