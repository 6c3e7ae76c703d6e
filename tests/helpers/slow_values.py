"""Values of a parametrized test of which one is enough for the fast suite."""

from typing import Any

import pytest


def slow(value: Any) -> Any:
    """The value, in the slow suite only."""
    return pytest.param(value, marks=pytest.mark.slow)
