"""Tasks of the tests of ``biscale_env.jobs``: at the top level, so that workers find them."""

import os
import signal
import time
from pathlib import Path

from biscale_env.core.errors import BiscaleError


def square(x):
    """A result that is known."""
    return x * x


def square_noted(folder, x, wait_s=0.0):
    """The same; leaves a file per start, named by process, and takes a while."""
    Path(folder, f"{x}-{os.getpid()}").touch()
    time.sleep(wait_s)
    return x * x


def square_after_a_kill(folder, x, victim):
    """The first time that the victim is asked for, its worker is killed."""
    mark = Path(folder, "killed")
    if x == victim and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square_noted(folder, x)


def square_after_results(folder, x, needed):
    """The first time, its worker is killed as soon as so many results were handed over."""
    mark = Path(folder, f"killed-{x}")
    if needed and not mark.exists():
        deadline = time.monotonic() + 60
        while len(list(Path(folder).glob("seen-*"))) < needed and time.monotonic() < deadline:
            time.sleep(0.01)
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x * x


def killed(x):
    """A task that no worker survives."""
    os.kill(os.getpid(), signal.SIGKILL)


def refused(x):
    """A mistake of the user."""
    raise BiscaleError(f"{x} is none")
