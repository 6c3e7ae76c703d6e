"""An engine: it appends ``running waiting`` to a file, a line per iteration."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from biscale_env.hardware.engines.hook.engine_record import EngineRecord, Queued, Scheduled


def records(address: str, stop: Callable[[], bool]) -> Iterator[EngineRecord]:
    """A record per line of the file, for as long as the bridge runs."""
    with Path(address).open() as log:
        while not stop():
            line = log.readline()
            if not line.endswith("\n"):
                time.sleep(0.02)
                continue
            running, waiting = map(int, line.split())
            yield EngineRecord(
                worker_id=f"logfile {address}",
                scheduled_requests=Scheduled(num_decode_requests=running),
                queued_requests=Queued(num_decode_requests=waiting),
            )
