"""Shared fixtures."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# how long an example takes is the machine's business: a busy one would fail tests at random
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parent.parent / "shared" / "data"
REAL_TIME = ("hardware", "dashboard")
"""Folders whose slow tests run in real time: never two of them at once."""


def unit_of(nodeid: str) -> str:
    """What a test is handed out with: all of real time together, of the rest every file."""
    file = nodeid.split("::")[0]
    part = file.removeprefix("tests/").split("/")[0]
    return "real time" if part in REAL_TIME else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The scheduler of ``--dist loadgroup``.

    xdist's own reads groups out of node ids, where pytest 9.2 no longer lets it write them
    (pytest-xdist issue 1386).
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    return ByUnit(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real traces and profiles beside the checkout.

    Tests that need it are skipped without.
    """
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared/data with the real traces is not here")
    return SHARED
