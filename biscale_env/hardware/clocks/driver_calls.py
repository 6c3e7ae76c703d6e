"""Driver calls: in order per GPU, side by side over GPUs, and never forgotten.

One call may take long (a GPU that is about to fall off the bus), and the driver may carry it out
after its caller has given up. So calls of one GPU run one after the other in a thread of its own: a
reset that follows a slow lock is carried out after it, never before.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping

from biscale_env.hardware.clocks.backend import ClockError, failures_of

# Longest wait for one round of calls, several times the slowest ones known. Together they stay
# under the 10 s that a parent waits for an actuator to end (loop/processes.py).
LOCK_TIMEOUT_S = 1.0
RESET_TIMEOUT_S = 3.0


class _Call:
    """One driver call and its end."""

    def __init__(self, key: str, function: Callable[[], None]) -> None:
        self.key, self.function = key, function
        self.ended = threading.Event()
        self.error: ClockError | None = None

    def run(self) -> None:
        self.error = failures_of({self.key: self.function}).get(self.key)
        self.ended.set()


class _Worker:
    """Makes the calls of one GPU; its thread does not keep the process alive."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self.last: _Call | None = None
        self._thread = threading.Thread(target=self._work, name=f"clock-{name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call.run()

    def submit(self, call: _Call) -> None:
        self.last = call
        self._calls.put(call)

    def end(self) -> None:
        self._calls.put(None)


def _late(uuid: str, timeout_s: float) -> ClockError:
    return ClockError(
        f"{uuid}: the driver has not ended a call within {timeout_s:g} s and may still carry it out"
    )


class DriverCalls:
    """Makes driver calls for several GPUs at once."""

    def __init__(self) -> None:
        """Prepare; threads are made when they are first needed."""
        self._workers: dict[str, _Worker] = {}

    def each(
        self, calls: Mapping[str, Callable[[], None]], timeout_s: float
    ) -> dict[str, ClockError]:
        """Make one call per GPU and wait until all have ended.

        Args:
            calls: what to do, by UUID.
            timeout_s: how long to wait for all of them together.

        Returns:
            What went wrong, by UUID. A call that has not ended in time is among them, and stays
            :meth:`outstanding` until it does.
        """
        made = {uuid: _Call(uuid, call) for uuid, call in calls.items()}
        for uuid, call in made.items():
            if uuid not in self._workers:
                self._workers[uuid] = _Worker(uuid)
            self._workers[uuid].submit(call)
        deadline = time.monotonic() + timeout_s
        failures = {}
        for uuid, call in made.items():
            if not call.ended.wait(max(deadline - time.monotonic(), 0.0)):
                failures[uuid] = _late(uuid, timeout_s)
            elif call.error is not None:
                failures[uuid] = call.error
        return failures

    def wait(self, uuid: str, timeout_s: float) -> None:
        """Wait until no call of a GPU is running.

        Raises:
            ClockError: one is still running when time is up.
        """
        worker = self._workers.get(uuid)
        if worker and worker.last and not worker.last.ended.wait(timeout_s):
            raise _late(uuid, timeout_s)

    def outstanding(self) -> set[str]:
        """UUIDs of GPUs with a call that has not ended."""
        return {
            uuid
            for uuid, worker in self._workers.items()
            if worker.last and not worker.last.ended.is_set()
        }

    def close(self) -> None:
        """Let the threads end after the calls that they have."""
        for worker in self._workers.values():
            worker.end()
        self._workers.clear()
