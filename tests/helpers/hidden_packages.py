"""A Python that lacks packages, as one lacks them where they were never installed."""

from collections.abc import Iterable


def without_packages(names: Iterable[str]) -> str:
    """Code that a new process begins with; whatever is imported or looked for after it is missing.

    ``None`` in ``sys.modules`` would do for an import, but SciPy and pytest look into that table
    for torch and for plug-ins, and stumble.
    """
    return f"""
import sys
from importlib.machinery import PathFinder
class Finder:
    invalidate_caches = PathFinder.invalidate_caches
    @staticmethod
    def find_spec(name, path=None, target=None):
        hidden = name.partition(".")[0] in {sorted(names)!r}
        return None if hidden else PathFinder.find_spec(name, path, target)
    @staticmethod
    def find_distributions(*context):
        return PathFinder.find_distributions(*context)
sys.meta_path[:] = [Finder if one is PathFinder else one for one in sys.meta_path]
"""
