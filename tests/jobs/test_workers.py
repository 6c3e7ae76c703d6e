"""The one door for tasks: every result once, in this process or others, whoever is killed."""

import importlib.util
import time
from contextlib import closing

import job_tasks
import pytest

from biscale_env.core.errors import BiscaleError
from biscale_env.jobs.workers import MOST_LOSSES, Workers, in_order, run_each

CALLS = [(x,) for x in range(9)]
EXPECTED = [x * x for x in range(9)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_result_comes_once_and_in_order_where_asked(jobs):
    found = list(run_each(job_tasks.square, CALLS, Workers(jobs)))
    assert sorted(found) == list(enumerate(EXPECTED))
    told = []
    assert in_order(job_tasks.square, CALLS, Workers(jobs), lambda *a: told.append(a)) == EXPECTED
    assert told == [(k, 9) for k in range(1, 10)]


@pytest.mark.slow
def test_results_come_as_they_finish_and_progress_counts_them(tmp_path):
    calls, told = [(tmp_path, 3, 0.5), (tmp_path, 2, 0.0)], []
    assert [k for k, _ in run_each(job_tasks.square_noted, calls, Workers(2))] == [1, 0]
    done = in_order(job_tasks.square_noted, calls, Workers(2), lambda *a: told.append(a))
    assert (done, told) == ([9, 4], [(1, 2), (2, 2)])


def test_one_job_runs_here_and_one_after_the_other(tmp_path):
    results = run_each(job_tasks.square_noted, [(tmp_path, x) for x in range(3)], Workers(1))
    with closing(results):
        assert next(results) == (0, 0)
        assert len(list(tmp_path.iterdir())) == 1  # the next has not begun


def test_one_job_costs_next_to_nothing():
    """Capacity tables are made of tasks of milliseconds."""
    calls = [(x,) for x in range(2000)]
    start_s = time.process_time()
    assert in_order(job_tasks.square, calls, Workers(1)) == [x * x for x in range(2000)]
    assert time.process_time() - start_s < 0.2


def test_a_killed_worker_loses_nothing_and_doubles_nothing(tmp_path):
    calls = [(tmp_path, x, 4) for x in range(9)]
    found = list(run_each(job_tasks.square_after_a_kill, calls, Workers(2)))
    assert (tmp_path / "killed").exists()
    assert sorted(found) == list(enumerate(EXPECTED))


@pytest.mark.slow
def test_many_losses_with_results_between_them_are_borne(tmp_path):
    """Every second task is lost once, after all before it were handed over."""
    calls = [(tmp_path, x, x * (x % 2)) for x in range(2 * MOST_LOSSES + 2)]
    found = []
    with closing(run_each(job_tasks.square_after_results, calls, Workers(2))) as results:
        for number, value in results:
            found.append((number, value))
            (tmp_path / f"seen-{number}").touch()
    assert len(list(tmp_path.glob("killed-*"))) == MOST_LOSSES + 1
    assert sorted(found) == [(x, x * x) for x in range(2 * MOST_LOSSES + 2)]


@pytest.mark.slow
def test_a_task_that_kills_every_worker_is_given_up_in_a_sentence():
    with pytest.raises(BiscaleError, match=f"killed {MOST_LOSSES} times in a row.*--jobs than 2"):
        list(run_each(job_tasks.killed, CALLS[:2], Workers(2)))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_mistake_in_a_task_is_told_as_it_is(jobs):
    with pytest.raises(BiscaleError, match=r"^\d is none$"):
        in_order(job_tasks.refused, CALLS, Workers(jobs))


def test_who_runs_alone():
    assert Workers().alone
    assert not Workers(2).alone
    assert not Workers(1, "auto").alone  # elsewhere, though one core


def test_workers_that_cannot_be(monkeypatch):
    assert Workers.of(None).jobs >= 1
    assert Workers.of(3) == Workers(3)
    assert Workers.of(Workers(2, "auto")) == Workers(2, "auto")
    assert Workers.of(None, "auto").ray == "auto"
    with pytest.raises(BiscaleError, match="--jobs must be at least 1, got 0"):
        Workers.of(0)
    with pytest.raises(BiscaleError, match="give one of them"):
        Workers.of(2, "auto")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BiscaleError, match=r"biscale-env\[ray\]"):
        list(run_each(job_tasks.square, CALLS, Workers(1, "auto")))
    assert list(run_each(job_tasks.square, [], Workers(1, "auto"))) == []
