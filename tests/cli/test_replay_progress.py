"""What a log shows of a replay that goes on."""

from types import SimpleNamespace

from biscale_env.cli.hw.replay_progress import replay_progress
from biscale_env.jobs import progress


def test_it_counts_requests_and_those_that_failed(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with replay_progress(3) as tell:
        for failed in (False, True, False):
            tell(SimpleNamespace(failed=failed))
    told = [line.partition(";")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == [
        "biscale: 1 of 3 requests",
        "biscale: 2 of 3 requests, 1 failed",
        "biscale: 3 of 3 requests, 1 failed",
    ]
