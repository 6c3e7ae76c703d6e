"""Modules beside the pages, which make their tables and figures."""

import contextlib
import importlib
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


@contextlib.contextmanager
def docs_module(name):
    """A module of ``docs/``, which can import its neighbours meanwhile."""
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(DOCS))
