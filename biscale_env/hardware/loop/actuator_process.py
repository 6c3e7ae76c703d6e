"""The actuator as a process: signals, what it prints, and every clock reset on any way out."""

import signal
import sys

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.loop.actuator import Actuator


def serve(actuator: Actuator) -> None:
    """Run an actuator until a signal.

    Every clock is reset on any way out. Prints ``actuator ready`` when it takes commands.

    Raises:
        BiscaleError: something failed; says so when a group was released or a clock could not be
            reset.
    """

    def ask_to_stop(number: int, frame: object) -> None:
        actuator.stopping = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ask_to_stop)
    trouble: list[str] = []
    try:
        for left in actuator.start():
            print(f"left behind by an earlier run: {left.uuid}: {left.text}", flush=True)
        print("actuator ready", flush=True)
        actuator.run()
    except BiscaleError as error:
        trouble.append(str(error))
    except BaseException:  # its traceback must not hide what was not reset
        print(*_end(actuator), sep="\n", file=sys.stderr)
        raise
    trouble += _end(actuator)
    if trouble:
        raise BiscaleError("; ".join(trouble))


def _end(actuator: Actuator) -> list[str]:
    """Stop; sentences about groups that were released and about what failed."""
    released = [
        f"group '{group.name}' was released: {group.released}"
        for group in actuator.groups.values()
        if group.released
    ]
    return released + actuator.stop()
