"""Nothing of ours may harm the engine: steps of a hook that never raise, or fall silent."""

import logging
from collections.abc import Callable
from typing import Any

MAX_FAILURES = 100  # failures of one step in a row after which the hook falls silent for good
NOTHING = object()  # what a step returns that had nothing to do: neither success nor failure
MARK = "_biscale_hook"
logger = logging.getLogger("biscale_hook")


class Guard:
    """Runs the steps of a hook. Whatever goes wrong stays here.

    The first failure of each step is logged, then no other of that step. A step that fails
    :data:`MAX_FAILURES` times in a row, counted for that step alone, silences the whole hook: a
    record that is made only in part would mislead the controller.

    Attributes:
        failures: failures in a row, by the name of the step.
        silent: whether the hook has given up.
    """

    def __init__(self, name: str, on_silence: Callable[[], None] = lambda: None) -> None:
        """Prepare.

        Args:
            name: what log lines call the hook.
            on_silence: called once when the hook falls silent; may itself fail.
        """
        self.name = name
        self.failures: dict[str, int] = {}
        self.silent = False
        self._on_silence = on_silence
        self._told: set[str] = set()

    @property
    def worst(self) -> int:
        """Failures in a row of the step that has most of them."""
        return max(self.failures.values(), default=0)

    def run(self, step: Callable[..., object], *args: Any) -> None:
        """Run a step unless the hook is silent; never raises."""
        if self.silent:
            return
        key = step.__name__
        try:
            if step(*args) is not NOTHING:
                self.failures[key] = 0
        except Exception as error:
            self._failed(key, error)

    def _failed(self, key: str, error: Exception) -> None:
        count = self.failures[key] = self.failures.get(key, 0) + 1
        if count >= MAX_FAILURES:
            self.silent = True
            logger.warning("%s: silent after %d failures in a row of '%s'", self.name, count, key)
            try:
                self._on_silence()
            except Exception as other:
                logger.warning("%s: %s: %s", self.name, type(other).__name__, other)
        elif key not in self._told:
            self._told.add(key)
            kind = type(error).__name__
            logger.warning("%s: %s: %s (serving goes on)", self.name, kind, error)


def first_copy(place: Any, module: str) -> bool:
    """Whether this module is the first that marks an object of the engine as its own.

    ``biscale-env`` and ``biscale-engine-hook`` may both be installed; their plug-ins are the same
    code under two names, and only one of them is to act.

    Args:
        place: class or module of the engine that plug-ins attach to.
        module: name of the asking module.
    """
    try:
        if not hasattr(place, MARK):
            setattr(place, MARK, module)
    except (AttributeError, TypeError):  # an object that takes no marks: nobody else marks it
        return True
    return bool(getattr(place, MARK) == module)
