"""Shared fixtures."""

from pathlib import Path

import pytest
from hypothesis import settings

# how long an example takes is the machine's business: a busy one would fail tests at random
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real traces and profiles beside the checkout.

    Tests that need it are skipped without.
    """
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared/data with the real traces is not here")
    return SHARED
