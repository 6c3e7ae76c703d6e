"""Windows of a long trace by its name, cut once: what was cut is kept in the user's cache."""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from biscale_env.core import user_cache
from biscale_env.core.errors import BiscaleError
from biscale_env.traces.catalog import load_named, trace_file
from biscale_env.traces.prompts.prompt_blocks import PromptBlocks
from biscale_env.traces.reading.readers import load_file
from biscale_env.traces.reading.reading_options import ReadingOptions
from biscale_env.traces.reading.recognised import LOGGER
from biscale_env.traces.request_classes import RequestClasses
from biscale_env.traces.trace import Trace
from biscale_env.traces.trace_windows import TraceWindow, WindowSpacing, read_windows, windows_of

FOLDER: Final = "trace-windows"
INDEX: Final = "windows.json"
"""Written last: a folder with it is complete."""
BLOCKS: Final = "blocks."
"""In front of the names of the columns of `Trace.blocks`."""
CLASSES: Final = "classes.codes"
"""Name of the column of `Trace.classes`."""
KEPT: Final = 16
"""Folders of windows that stay in the cache (assumed); see `user_cache.prune`."""


def named_windows(
    name: str, plan: WindowSpacing, options: ReadingOptions | None = None
) -> list[TraceWindow]:
    """Windows of a trace by its name, those without a request left out.

    A file is streamed once: its windows are kept in the cache, under the file's size and time of
    change, the options, and the code that reads it. A file that has to be sorted is read whole.

    Args:
        name: as of `load_named`.
        plan: length and distance of the windows.
        options: how a file is read, and which part of the trace.

    Raises:
        BiscaleError: as `load_named`, no whole window, or no request in any.
    """
    options = options or ReadingOptions()
    path = trace_file(name)
    if path is None:
        found = windows_of(load_named(name, options), plan.length_s, plan.every_s)
        return _with_requests(name, plan, found)
    folder = user_cache.cache_root() / FOLDER / _key(path, plan, options)
    if (kept := _recall(folder)) is not None:
        LOGGER.info(
            f"{path}: {len(kept)} windows of {plan.length_s:g} s every {plan.every_s:g} s, cut "
            f"before and kept in {folder}"
        )
        return kept
    user_cache.prune(folder.parent, KEPT)
    found = _with_requests(name, plan, _cut(path, plan, options))
    rows = [_keep(window, _file(folder, k)) for k, window in enumerate(found)]
    user_cache.remember(folder / INDEX, json.dumps(rows))
    return found


def _with_requests(
    name: str, plan: WindowSpacing, windows: Iterable[TraceWindow]
) -> list[TraceWindow]:
    every = list(windows)
    found = [window for window in every if len(window.trace)]
    if not found:
        raise BiscaleError(f"{name}: no window of {plan.length_s:g} s has a request")
    if without := len(every) - len(found):
        LOGGER.info(f"{name}: {without} of {len(every)} windows have no request: left out")
    return found


def _cut(path: Path, plan: WindowSpacing, options: ReadingOptions) -> Iterator[TraceWindow]:
    if not options.sort:
        yield from read_windows(path, plan.length_s, plan.every_s, options=options)
        return
    loaded = load_file(path, None, options)
    trace, about = loaded.trace, loaded.recognised
    origin = about.origin_unix_s if about else None
    if origin is not None:  # days are the file's, times those of the part
        origin += options.part_s(origin, str(path))[0]
    yield from windows_of(trace, plan.length_s, plan.every_s, origin_unix_s=origin)


def _keep(window: TraceWindow, path: Path) -> dict[str, Any]:
    """Write the columns of a window to a file; everything else, for the index."""
    trace = window.trace
    columns, rest = _columns(trace)
    if trace.blocks is not None:
        of_blocks, rest["blocks"] = _columns(trace.blocks)
        columns |= {f"{BLOCKS}{name}": values for name, values in of_blocks.items()}
    if trace.classes is not None:
        columns[CLASSES], rest["classes"] = trace.classes.codes, list(trace.classes.names)
    buffer = io.BytesIO()
    np.savez(buffer, **columns)
    user_cache.remember(path, buffer.getvalue())
    return {"trace": rest, "sha256": trace.sha256} | {
        name: getattr(window, name) for name in ("start_s", "day", "label")
    }


def _columns(data: Trace | PromptBlocks) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields that are arrays, and the others."""
    own = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    columns = {name: value for name, value in own.items() if isinstance(value, np.ndarray)}
    return columns, {name: value for name, value in own.items() if name not in columns}


def _recall(folder: Path) -> list[TraceWindow] | None:
    """Windows that were cut before; None where one of them is absent or damaged."""
    rows = user_cache.recall(folder / INDEX)
    try:
        found = [_window(row, _file(folder, k)) for k, row in enumerate(rows)]
    except (TypeError, KeyError, ValueError, OSError, zipfile.BadZipFile):
        return None
    user_cache.mark_used(folder)
    return found


def _window(row: dict[str, Any], file: Path) -> TraceWindow:
    with np.load(file) as kept:
        columns = {name: kept[name] for name in kept.files}
    rest, of_blocks = dict(row["trace"]), {n for n in columns if n.startswith(BLOCKS)}
    if rest["blocks"] is not None:
        found = {name.removeprefix(BLOCKS): columns.pop(name) for name in of_blocks}
        rest["blocks"] = PromptBlocks(**rest["blocks"], **found)
    if rest["classes"] is not None:
        rest["classes"] = RequestClasses(tuple(rest["classes"]), columns.pop(CLASSES))
    trace = Trace(**rest, **columns)
    if trace.sha256 != row["sha256"]:
        raise ValueError(f"{file} is damaged")
    return TraceWindow(trace, float(row["start_s"]), int(row["day"]), str(row["label"]))


def _file(folder: Path, k: int) -> Path:
    return folder / f"{k:05d}.npz"


def _key(path: Path, plan: WindowSpacing, options: ReadingOptions) -> str:
    """Hash of the file's place, size and time, the options, and the code that reads it."""
    try:
        at = path.resolve().stat()
    except OSError as error:
        raise BiscaleError(f"cannot read {path}: {error.strerror or error}") from None
    parts = [str(path.resolve()), at.st_size, at.st_mtime_ns, plan.model_dump_json()]
    text = json.dumps([*parts, options.model_dump_json(), _code()])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _code() -> str:
    """Hash of the code of this package."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
