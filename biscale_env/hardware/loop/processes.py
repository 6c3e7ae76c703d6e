"""Child processes that do not outlive their parent."""

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from biscale_env.core.errors import BiscaleError

# Runs first in the child: SIGTERM when the parent dies, by whatever way (PR_SET_PDEATHSIG = 1,
# linux/prctl.h).
PROGRAM = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(os.environ["BISCALE_PARENT"]):
    sys.exit(0)
from biscale_env.cli import main
main()
"""


FIRST = -10  # nice value of processes that decide and actuate
SWITCH_S = 0.0005  # Python's own 5 ms is what a waiting thread may lose to a busy one


def quick_threads() -> None:
    """Make a latency-bound process.

    Threads hand over quickly, and what was loaded so far is no garbage to look through again.
    """
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()


def go_first() -> None:
    """Ask for this thread to run before others, in real time if possible.

    Granted to root, silently refused to others.

    Threads made afterwards inherit it. So call it after loading and warming up (real time is for
    short answers, not for start-up, and not for the threads of a policy's library) and before
    ZeroMQ makes its threads. Never set it on ZeroMQ's threads from outside: one that is just
    starting sets its own scheduling again, and the library aborts the process when that fails.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, FIRST)


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """This thread is scheduled before ordinary ones, but not in real time.

    Granted to root, silently refused to others.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, FIRST)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


class Child:
    """``biscale ...`` as a process of its own; its output is kept, its end is orderly."""

    def __init__(
        self, name: str, arguments: Sequence[str], env: dict[str, str] | None = None
    ) -> None:
        """Start.

        Args:
            name: what errors call it.
            arguments: arguments of the ``biscale`` command.
            env: additions to the environment.
        """
        self.name = name
        command = [sys.executable, "-u", "-c", PROGRAM, *arguments]
        surroundings = {**os.environ, **(env or {}), "BISCALE_PARENT": str(os.getpid())}
        self.process = subprocess.Popen(
            command,
            env=surroundings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return self.process.poll() is None

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        """Wait until it prints a line with ``text``.

        Raises:
            BiscaleError: it ended before, with the reason it gave; or it took too long.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not any(text in line for line in self.lines):
                if not self._reader.is_alive():
                    raise BiscaleError(self.reason())
                if time.monotonic() > deadline:
                    raise BiscaleError(f"{self.name} did not get ready within {timeout_s:g} s")
                self._changed.wait(0.2)

    def reason(self) -> str:
        """Why it ended: its own last sentence."""
        self.process.wait()
        self._reader.join(1.0)
        said = [line.removeprefix("biscale: ") for line in self.lines if line.strip()]
        return (
            f"{self.name}: {said[-1]}"
            if said
            else f"{self.name} ended with code {self.process.returncode}"
        )

    def stop(self, timeout_s: float = 10.0) -> int:
        """Ask it to end, insist after a while; its exit code."""
        if self.running:
            self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(1.0)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return self.process.returncode
