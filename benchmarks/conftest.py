"""The meter of the speed benchmarks, and the table at the end: ``make bench``."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from meter import Meter, Metric

METRICS: pytest.StashKey[list[Metric]] = pytest.StashKey()


@pytest.fixture
def meter(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Meter]:
    """A meter on CPU time, or on wall time where the test is marked ``benchmark(timer=...)``."""
    if request.node.get_closest_marker("benchmark") is None:
        benchmark._timer = time.process_time
    made = Meter(benchmark)
    yield made
    request.config.stash.setdefault(METRICS, []).extend(made.metrics)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of every metric against its target."""
    metrics = config.stash.get(METRICS, [])
    if metrics:
        terminalreporter.section("speed against targets (ratio above 1 is better)")
        for metric in metrics:
            terminalreporter.write_line(metric.line())
