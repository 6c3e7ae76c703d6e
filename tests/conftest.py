"""Shared fixtures."""

from pathlib import Path

import pytest
from hypothesis import settings

# how long an example takes is the machine's business: a busy one would fail tests at random
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parent.parent / "shared" / "data"
REAL_TIME = ("hardware", "dashboard")
"""Folders whose slow tests run in real time: never two of them at once."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--dist loadgroup`` all of real time is one group, of the rest every file."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        part = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        group = "real time" if part in REAL_TIME else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real traces and profiles beside the checkout.

    Tests that need it are skipped without.
    """
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared/data with the real traces is not here")
    return SHARED
