"""How far a replay is: requests that have ended, and how many of them failed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from biscale_env.hardware.replay.request_record import RequestRecord
from biscale_env.jobs.progress import JobProgress


@contextmanager
def replay_progress(total: int) -> Iterator[Callable[[RequestRecord], None]]:
    """A bar, or lines in a log; yields what is to be called with every request that has ended.

    Args:
        total: requests of the trace.
    """
    done = failed = 0
    with JobProgress("requests", total, transient=True) as progress:

        def tell(record: RequestRecord) -> None:
            nonlocal done, failed
            done, failed = done + 1, failed + record.failed
            progress.tell(done, note=f"{failed} failed" if failed else "")

        yield tell
