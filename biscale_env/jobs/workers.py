"""The one door for whatever loops over points, seeds, worlds or trials.

A task is a function of the top level of a module and its arguments; it runs in this process, in
others on this machine (joblib's loky) or on a Ray cluster. Each result is handed over once, as it
is finished, whichever workers are lost meanwhile: a task whose worker was killed runs again.
"""

import os
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from biscale_env.core.errors import BiscaleError

T = TypeVar("T")
IDLE_WORKER_S: Final = 3600
"""A worker that waits for a long task elsewhere keeps its compiled kernels."""
MOST_LOSSES: Final = 4
"""Assumed: workers that are lost so often in a row, without a result between, are no accident."""


@dataclass(frozen=True)
class Workers:
    """Where tasks run.

    Attributes:
        jobs: processes on this machine; 1: in this one.
        ray: address of a Ray cluster instead, ``auto`` or ``HOST:PORT``.
    """

    jobs: int = 1
    ray: str | None = None

    @classmethod
    def of(cls, jobs: "int | Workers | None", ray: str | None = None) -> "Workers":
        """What was asked for; all cores by default.

        Raises:
            BiscaleError: less than one process, or both processes and a cluster.
        """
        if isinstance(jobs, Workers):
            return jobs
        if jobs is not None and jobs < 1:
            raise BiscaleError(f"--jobs must be at least 1, got {jobs}")
        if jobs is not None and ray is not None:
            raise BiscaleError(
                "--jobs counts processes on this machine, --ray names a cluster: give one of them"
            )
        return cls(jobs or os.cpu_count() or 1, ray)

    @property
    def alone(self) -> bool:
        """Whether tasks run in this process, one after the other."""
        return self.ray is None and self.jobs == 1


def run_each(
    function: Callable[..., T], calls: Sequence[tuple[Any, ...]], workers: Workers
) -> Generator[tuple[int, T]]:
    """Run a function once per call and yield number and result of each as it finishes.

    Close the iterator when it is left early (``contextlib.closing``): that ends the workers.

    Args:
        function: of the top level of a module, so that it can be sent.
        calls: arguments of each task.
        workers: where.

    Raises:
        BiscaleError: a task raises it, workers are lost again and again, or there is no cluster.
    """
    if workers.ray is not None and calls:
        from biscale_env.jobs.on_ray import run_on_ray

        yield from run_on_ray(function, calls, workers.ray)
    elif workers.alone or len(calls) <= 1:
        for number, call in enumerate(calls):
            yield number, function(*call)
    else:
        yield from _on_cores(function, calls, workers.jobs)


def in_order(
    function: Callable[..., T],
    calls: Sequence[tuple[Any, ...]],
    workers: Workers,
    progress: Callable[[int, int], None] | None = None,
) -> list[T]:
    """Results of all calls, in the order of the calls.

    Args:
        function: see :func:`run_each`.
        calls: arguments of each task.
        workers: where.
        progress: called with (done, all) after each.

    Raises:
        BiscaleError: see :func:`run_each`.
    """
    found: dict[int, T] = {}
    with closing(run_each(function, calls, workers)) as results:
        for number, result in results:
            found[number] = result
            if progress is not None:
                progress(len(found), len(calls))
    return [found[number] for number in range(len(calls))]


def _on_cores(
    function: Callable[..., T], calls: Sequence[tuple[Any, ...]], jobs: int
) -> Generator[tuple[int, T]]:
    """Over processes; the tasks of lost ones, and those behind them, run again."""
    left, losses = dict(enumerate(calls)), 0
    while left:
        try:
            with closing(_loky(function, left, jobs)) as results:
                for number, result in results:
                    del left[number]
                    losses = 0
                    yield number, result
        except TerminatedWorkerError:
            losses += 1
            if losses == MOST_LOSSES:
                raise BiscaleError(
                    f"worker processes were killed {losses} times in a row, perhaps for memory: "
                    f"use fewer --jobs than {jobs}"
                ) from None


def _loky(
    function: Callable[..., T], calls: Mapping[int, tuple[Any, ...]], jobs: int
) -> Generator[tuple[int, T]]:
    tasks = [joblib.delayed(numbered)(function, number, call) for number, call in calls.items()]
    with joblib.parallel_config("loky", inner_max_num_threads=1, idle_worker_timeout=IDLE_WORKER_S):
        parallel = joblib.Parallel(
            n_jobs=min(jobs, len(tasks)), return_as="generator_unordered", batch_size=1
        )
        results = parallel(tasks)
        try:
            # not `yield from`, which would close joblib's generator outside of the filter
            for result in results:  # noqa: UP028
                yield result
        finally:
            _close_quietly(results)


def numbered(function: Callable[..., T], number: int, call: tuple[Any, ...]) -> tuple[int, T]:
    """Number and result of one task; at the top level, so that it can be sent."""
    return number, function(*call)


def _close_quietly(results: Any) -> None:
    """Close joblib's generator; its warning is no news to whoever interrupted."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*tasks which were still being processed", category=UserWarning
        )
        results.close()
