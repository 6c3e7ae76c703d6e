"""How far long work is, in a log and on a terminal."""

import io
import sys

import pytest

from biscale_env.jobs import progress as module
from biscale_env.jobs.progress import LINE_EVERY_S, JobProgress


@pytest.fixture
def clock(monkeypatch):
    """Times that ``time.monotonic`` gives, one after the other, s."""
    times = []
    monkeypatch.setattr(module.time, "monotonic", lambda: times.pop(0))
    return times


def test_a_log_has_a_line_now_and_then_with_the_time_to_go(clock, capsys):
    """Of 10 jobs 4 were finished before: 3 that took a minute each leave as much to do."""
    clock += [0.0, 1.0, LINE_EVERY_S - 1.0, LINE_EVERY_S, LINE_EVERY_S + 1.0]
    with JobProgress("runs", 10, 4) as lines:
        for done in (5, 6, 7, 8):
            lines.tell(done, name=f"decode job-{done}", cpu_s=60.0)
    assert capsys.readouterr().err == (
        "biscale: 7 of 10 runs, last decode job-7; 3.0 minutes of processor time, about 3.0 to go\n"
    )


def test_what_was_finished_before_the_first_telling_took_no_time(clock, capsys):
    """90 of 100 were kept from before; two more in two minutes leave eight minutes."""
    clock += [0.0, 600.0, 600.0, 720.0]
    with JobProgress("points") as lines:
        lines.tell(90, 100)
        lines.tell(92, 100)
    assert capsys.readouterr().err == "biscale: 92 of 100 points; 2.0 minutes, about 8.0 to go\n"


def test_on_a_terminal_there_is_a_bar_and_no_line(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with JobProgress("runs", 2) as bar:
        bar.tell(1, name="decode max", cpu_s=60.0)
    told = sys.stderr.getvalue()
    assert "decode max" in told
    assert "1/2" in told
    assert "minutes" not in told


def test_silence_without_a_finished_job(monkeypatch, capsys):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    with JobProgress("runs", 3, 1) as lines:
        lines.tell(1)
    assert capsys.readouterr().err == ""


def test_a_note_stands_behind_the_jobs(clock, capsys):
    clock += [0.0, LINE_EVERY_S]
    with JobProgress("requests", 4) as lines:
        lines.tell(2, note="1 failed")
    assert capsys.readouterr().err == (
        "biscale: 2 of 4 requests, 1 failed; 0.3 minutes, about 0.3 to go\n"
    )
