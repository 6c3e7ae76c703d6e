"""A Python that lacks packages, as one lacks them where they were never installed."""

from collections.abc import Iterable


def without_packages(names: Iterable[str]) -> str:
    """Code that a new process begins with; whatever is imported or looked for after it is missing.

    ``None`` in ``sys.modules`` would do for an import, but SciPy and pytest look into that table
    for torch and for plug-ins, and stumble. The finder itself is changed, since pytest asks it past
    ``sys.meta_path`` for whatever it rewrites.
    """
    return f"""
import sys
from importlib.machinery import PathFinder
def find_spec(cls, name, path=None, target=None, found=PathFinder.find_spec):
    return None if name.partition(".")[0] in {sorted(names)!r} else found(name, path, target)
PathFinder.find_spec = classmethod(find_spec)
"""
