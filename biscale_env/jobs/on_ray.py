"""Tasks on a Ray cluster: as Ray tasks, which Ray starts again elsewhere when a node is lost.

Ray's backend of joblib keeps its tasks in actors, and one that is lost takes its results with it.
"""

import socket
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from biscale_env.core.errors import BiscaleError
from biscale_env.core.extras import need_packages

T = TypeVar("T")
_CHECK_S = 1.0
ANSWER_S = 5.0


def run_on_ray(
    function: Callable[..., T], calls: Sequence[tuple[Any, ...]], address: str
) -> Generator[tuple[int, T]]:
    """Run every call as a Ray task of one core; yields number and result as they finish.

    Leaving early cancels what is not finished.

    Args:
        function: of the top level of a module that every node has.
        calls: arguments of each task.
        address: ``auto`` or ``HOST:PORT``.

    Raises:
        BiscaleError: Ray is not installed, there is no cluster, or a task raises it.
    """
    need_packages("--ray needs", "ray", {"ray": "Ray"})
    import ray

    ours = _connect(ray, address)
    # -1: a worker or a node may be lost any number of times; an exception of the task is told
    task = ray.remote(max_retries=-1, num_cpus=1)(_outcome)
    waiting: dict[Any, int] = {}
    try:
        waiting = {task.remote(function, call): k for k, call in enumerate(calls)}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_CHECK_S)
            for reference in ready:
                number = waiting.pop(reference)
                result, error = ray.get(reference)
                if error is not None:
                    raise error
                yield number, result
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str) -> bool:
    """Join the cluster, if this process has not; whether it is to be left again.

    Raises:
        BiscaleError: there is none.
    """
    if ray.is_initialized():
        return False
    _must_answer(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or ["it does not answer"])[0].rstrip(".")
        raise _no_cluster(address, reason) from None
    return True


def _must_answer(address: str) -> None:
    """Refuse at once an address where nobody listens: Ray itself tries for minutes.

    Raises:
        BiscaleError: nobody does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except (OSError, ValueError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise _no_cluster(address, reason) from None


def _no_cluster(address: str, reason: str) -> BiscaleError:
    return BiscaleError(
        f"--ray {address}: no cluster there ({reason}); start one with `ray start --head` and give "
        "its HOST:PORT"
    )


def _outcome(
    function: Callable[..., T], call: tuple[Any, ...]
) -> tuple[T | None, Exception | None]:
    """Result of a task, or our own error as it is: Ray would wrap it into a traceback."""
    try:
        return function(*call), None
    except BiscaleError as error:
        return None, error
