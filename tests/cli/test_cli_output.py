"""Full disks, closed pipes and files that cannot be used end a command in a sentence."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from biscale_env import cli

COMMAND = [sys.executable, "-m", "biscale_env.cli", "traces", "list"]


def end(monkeypatch, capsys, error):
    """Exit code and standard error of a command that raises ``error``."""

    def fail():
        raise error

    monkeypatch.setattr(cli, "build", lambda: fail)
    monkeypatch.setattr(cli, "_drop_output", lambda: None)
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence_whatever_was_written(monkeypatch, capsys, number):
    reason = os.strerror(number).lower()
    code, told = end(monkeypatch, capsys, OSError(number, os.strerror(number), "runs/x/a.parquet"))
    assert (code, told) == (2, f"biscale: cannot use runs/x/a.parquet: {reason}\n")
    code, told = end(monkeypatch, capsys, OSError(number, os.strerror(number)))
    assert (code, told) == (2, f"biscale: a file or the output cannot be written: {reason}\n")


def test_a_reader_that_went_away_is_no_error_to_talk_about(monkeypatch, capsys):
    assert end(monkeypatch, capsys, BrokenPipeError(errno.EPIPE, "Broken pipe")) == (1, "")


def test_other_errors_of_the_system_are_faults_of_ours(monkeypatch):
    def fail():
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(cli, "build", lambda: fail)
    with pytest.raises(OSError, match="Invalid argument"):
        cli.main()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
def test_output_on_a_full_disk():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(COMMAND, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("biscale: a file or the output cannot be written: no space")
    assert done.stderr.count("\n") == 1


def test_output_that_nobody_reads():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(COMMAND, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("arguments", [("traces", "list"), ("compare", "--help")])
def test_letters_that_the_output_cannot_encode(encoding, arguments):
    """As on a Windows console, in a pipe there, or under LANG=C without UTF-8 mode."""
    done = subprocess.run(
        [sys.executable, "-m", "biscale_env.cli", *arguments],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "trace" in done.stdout.decode(encoding).lower()


def test_streams_get_their_strictness_back(tmp_path, monkeypatch):
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with cli.polite_process():
            assert stream.errors == "replace"
            print("30 \N{LESS-THAN OR EQUAL TO} 40")
        assert stream.errors == "strict"
    assert (tmp_path / "out").read_text() == "30 ? 40\n"
