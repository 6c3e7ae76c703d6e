"""Request traces: the `Trace` itself, readers, generators and downloads.

Names are loaded when they are first used, so that importing `Trace` alone does not pull in pyarrow,
pandas and scipy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biscale_env.traces.catalog import list_traces, load_named
    from biscale_env.traces.download import cache_dir, fetch
    from biscale_env.traces.reading.readers import LoadedTrace, iter_trace, load_file, read_trace
    from biscale_env.traces.reading.reading_options import ReadingOptions
    from biscale_env.traces.reading.recognised import Recognised
    from biscale_env.traces.synthetic.profiles import (
        Arrivals,
        LengthProfile,
        Modulation,
        RateEnvelope,
        WorkloadProfile,
        load_envelope,
        load_lengths,
        load_workload,
    )
    from biscale_env.traces.synthetic.synthesize import generate, with_lengths
    from biscale_env.traces.trace import Trace
    from biscale_env.traces.trace_statistics import TraceStatistics, describe
    from biscale_env.traces.trace_windows import (
        TraceWindow,
        WindowSpacing,
        read_windows,
        windows_of,
    )
    from biscale_env.traces.window_cache import named_windows
    from biscale_env.traces.writers import write_trace

__all__ = [
    "Arrivals",
    "LengthProfile",
    "LoadedTrace",
    "Modulation",
    "RateEnvelope",
    "ReadingOptions",
    "Recognised",
    "Trace",
    "TraceStatistics",
    "TraceWindow",
    "WindowSpacing",
    "WorkloadProfile",
    "cache_dir",
    "describe",
    "fetch",
    "generate",
    "iter_trace",
    "list_traces",
    "load_envelope",
    "load_file",
    "load_lengths",
    "load_named",
    "load_workload",
    "named_windows",
    "read_trace",
    "read_windows",
    "windows_of",
    "with_lengths",
    "write_trace",
]

_HOMES = {
    "catalog": ("list_traces", "load_named"),
    "download": ("cache_dir", "fetch"),
    "reading.readers": ("LoadedTrace", "iter_trace", "load_file", "read_trace"),
    "reading.reading_options": ("ReadingOptions",),
    "reading.recognised": ("Recognised",),
    "trace": ("Trace",),
    "trace_statistics": ("TraceStatistics", "describe"),
    "synthetic.synthesize": ("generate", "with_lengths"),
    "trace_windows": ("TraceWindow", "WindowSpacing", "read_windows", "windows_of"),
    "window_cache": ("named_windows",),
    "writers": ("write_trace",),
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "synthetic.profiles")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
