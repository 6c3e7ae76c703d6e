"""Traces by name: generated from shipped profiles, downloaded public files, or one's own files."""

from dataclasses import dataclass
from pathlib import Path

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.download import cached_path, load_downloads
from biscale_env.traces.reading.readers import LoadedTrace, load_file
from biscale_env.traces.reading.reading_options import ReadingOptions
from biscale_env.traces.synthetic.profiles import load_workload, profile_names
from biscale_env.traces.synthetic.synthesize import generate
from biscale_env.traces.trace import Trace


@dataclass(frozen=True)
class CatalogEntry:
    """A trace that has a name.

    Attributes:
        name: name for `load_named`.
        kind: ``generated`` or ``public``.
        ready: whether it can be loaded now (a public one only once it was fetched).
        requests: number of requests; of a generated one its expectation.
        source: citation.
    """

    name: str
    kind: str
    ready: bool
    requests: int
    source: str


def list_traces() -> list[CatalogEntry]:
    """All named traces, generated ones first."""
    workloads = [load_workload(name) for name in profile_names()]
    generated = [
        CatalogEntry(w.name, "generated", True, round(w.rate_rps * w.duration_s), w.source)
        for w in workloads
    ]
    files = load_downloads().files
    public = [
        CatalogEntry(n, "public", cached_path(n) is not None, d.requests, d.citation)
        for n, d in files.items()
    ]
    return generated + public


def load_named(name: str, options: ReadingOptions | None = None) -> Trace:
    """Load a trace by its name, or from a file.

    Args:
        name: a shipped workload (generated with its own rate, duration and seed), a fetched public
            trace, a workload profile (``.yaml``), or a trace file.
        options: how a file is read, and which part of the trace.

    Raises:
        BiscaleError: no such name or file, a public trace that was not fetched yet, or a bad file.
    """
    return load_with_notes(name, options).trace


def load_with_notes(name: str, options: ReadingOptions | None = None) -> LoadedTrace:
    """Load a trace as `load_named`, with what was recognised in its file.

    Raises:
        BiscaleError: as `load_named`, or options of files for a trace that is generated.
    """
    options = options or ReadingOptions()
    path = trace_file(name)
    if path is None:
        return LoadedTrace(_generated(name, options))
    return load_file(path, name if name in load_downloads().files else None, options)


def trace_file(name: str) -> Path | None:
    """The file that a name of `load_named` stands for; None for a trace that is generated.

    Raises:
        BiscaleError: no such name or file, or a public trace that was not fetched yet.
    """
    if name in profile_names() or Path(name).suffix in {".yaml", ".yml"}:
        return None
    if name in load_downloads().files:
        path = cached_path(name)
        if path is None:
            raise BiscaleError(
                f"trace '{name}' is not in the cache yet: run 'biscale traces fetch {name}' first"
            )
        return path
    if Path(name).is_file() or Path(name).suffix:
        return Path(name)
    known = ", ".join(entry.name for entry in list_traces())
    raise BiscaleError(f"there is no trace '{name}'; known: {known}, or the path of a file")


def _generated(name: str, options: ReadingOptions) -> Trace:
    if not options.for_files.is_default:
        raise BiscaleError(
            f"'{name}' is a generated trace, so the options of files (--time-column, --time-unit, "
            "--sort, --drop-failed, ...) do not apply; only --from and --to do"
        )
    made = generate(name)
    if options.is_default:
        return made
    first_s, last_s = options.part_s(None, name)
    return made.window(first_s, last_s)
