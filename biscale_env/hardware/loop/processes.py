"""Child processes that do not outlive their parent."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole

# Runs first in the child: SIGTERM when the thread that made it ends, at the latest with the parent
# process, by whatever way it dies (PR_SET_PDEATHSIG = 1, linux/prctl.h).
PROGRAM = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(os.environ["BISCALE_PARENT"]):
    sys.exit(0)
from biscale_env.cli import main
main()
"""


REFUSAL = "biscale: "  # how the command line begins the sentence it ends with
ELEVATED_NICE = -10  # nice value of processes that decide and actuate
SWITCH_S = 0.0005  # Python's own 5 ms is what a waiting thread may lose to a busy one


@contextlib.contextmanager
def tuned_for_latency() -> Iterator[None]:
    """Keep the waits of this process short inside the block; for processes of our own.

    Threads hand over quickly, and what was loaded so far is not searched for garbage again. Both
    are properties of the whole process, and are as before afterwards.
    """
    switch_s, frozen = sys.getswitchinterval(), gc.get_freeze_count()
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        sys.setswitchinterval(switch_s)
        if not frozen:  # what somebody else has frozen stays so
            gc.unfreeze()


def set_realtime() -> None:
    """Ask for this thread to be scheduled in real time, or else before ordinary ones.

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
            os.setpriority(os.PRIO_PROCESS, 0, ELEVATED_NICE)


@contextlib.contextmanager
def elevated_priority() -> Iterator[None]:
    """Schedule this thread before ordinary ones, but not in real time, inside the block.

    Granted to root, silently refused to others.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, ELEVATED_NICE)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


def until_signal() -> threading.Event:
    """An event that is set by SIGINT, SIGTERM or SIGHUP; call it from the main thread."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    return ended


class _Starter:
    """Starts child processes from a thread that lives as long as this process.

    The kernel sends the signal of PR_SET_PDEATHSIG when the *thread* that made the child ends
    (prctl(2)), so a child made by a short-lived thread would end with that thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="biscale-children")

    def start(self, command: Sequence[str], env: dict[str, str]) -> subprocess.Popen[str]:
        """Start a command; its output comes as text, its session is its own."""
        with self._lock:
            if self._pid != os.getpid():  # a fork has no threads of its parent
                self._pid = os.getpid()
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="biscale-children")
        return self._pool.submit(_popen, command, env).result()


def _popen(command: Sequence[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


_starter = _Starter()


def _announces(line: str, text: str) -> bool:
    return line == text or (line.endswith(f" {text}") and not line.startswith(REFUSAL))


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
        self.process = _starter.start(command, surroundings)
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @classmethod
    def with_settings(
        cls, name: str, command: Sequence[str], settings: Mapping[str, object], file: Path
    ) -> "Child":
        """Start a command whose options are handed over in a YAML file.

        Args:
            name: what errors call it.
            command: words of the command, e.g. ``("hw", "control")``.
            settings: its options by name.
            file: the file to write them to.
        """
        write_whole(file, yaml.safe_dump(dict(settings), sort_keys=False))
        return cls(name, [*command, "--settings", str(file)])

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
        """Wait until it prints a line that is ``text``, or ends with it as words of its own.

        A sentence of refusal is never taken for it, whatever words it has.

        Raises:
            BiscaleError: it ended before, with the reason it gave; or it took too long.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not any(_announces(line, text) for line in self.lines):
                if not self._reader.is_alive() or not self.running:
                    raise BiscaleError(self.reason())
                if time.monotonic() > deadline:
                    raise BiscaleError(f"{self.name} did not get ready within {timeout_s:g} s")
                self._changed.wait(0.2)

    def reason(self) -> str:
        """Why it ended: its own last sentence."""
        self.process.wait()
        self._reader.join(1.0)
        said = [line.removeprefix(REFUSAL) for line in self.lines if line.strip()]
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


def wait_with(children: Iterable[Child]) -> None:
    """Wait for a signal or for a child to end; call it from the main thread.

    Raises:
        BiscaleError: a child ended by itself.
    """
    ended, watched = until_signal(), tuple(children)
    while not ended.wait(0.3):
        for child in watched:
            if not child.running:
                raise BiscaleError(child.reason())
