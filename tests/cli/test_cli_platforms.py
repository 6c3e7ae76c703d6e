"""The command without what other systems lack, and what it leaves in the caller's process."""

import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from biscale_env.cli import ending_signals, main, polite_process
from biscale_env.core.errors import BiscaleWarning
from biscale_env.reproduce import day

ROOT = Path(__file__).resolve().parents[2]
# What Windows lacks. Modules of others (joblib, asyncio) look at the platform first, so only ours
# are denied what is missing.
ABSENT = """
import builtins, os, signal, socket, sys
usual = builtins.__import__
os.environ["USERNAME"] = "someone"  # as Windows has it
missing = {"fcntl", "resource", "pwd", "grp", "termios"}
def denied(name, globals=None, *rest, **more):
    top = (globals or {}).get("__name__", "").split(".")[0]
    ours = top in {"biscale_env", "agents", "controllers"}
    if ours and name in missing:
        raise ImportError(f"No module named {name!r}")
    return usual(name, globals, *rest, **more)
import asyncio, filelock, joblib, numba, numpy, pandas, platformdirs  # as they are here
builtins.__import__ = denied
for name in ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
for name in ("geteuid", "getuid", "sched_setscheduler", "SCHED_RR", "O_DIRECTORY", "O_NOFOLLOW"):
    delattr(os, name)
del socket.AF_UNIX
"""


def without(code, *, platform=None, cwd):
    start = ABSENT + (f"sys.platform = {platform!r}\n" if platform else "")
    return subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def command(*arguments):
    return f"sys.argv = {['biscale', *arguments]!r}\nfrom biscale_env.cli import main\nmain()\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("traces", "list"),
        ("predict", "decode", "--help"),
        ("reproduce", "--help"),
        pytest.param(
            ("compare", "--phase", "decode", "--quick", "--policies", "static:900", "--jobs", "1"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda a: a[0],
)
def test_commands_need_nothing_that_windows_lacks(arguments, tmp_path):
    done = without(command(*arguments), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_every_module_outside_of_hardware_can_be_imported(tmp_path):
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for top in ("biscale_env", "agents", "controllers")
        for path in (ROOT / top).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    )
    ours = [name for name in modules if not name.startswith("biscale_env.hardware")]
    assert len(ours) > 100
    code = f"""
import importlib
for name in {ours!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").split(".")[0] in ("biscale_env", "agents", "controllers") or (
            any(word in str(error) for word in missing)
        ):
            raise
"""
    done = without(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_training_works_without_them(tmp_path):
    pytest.importorskip("stable_baselines3")
    code = """
import gymnasium, biscale_env
from stable_baselines3 import PPO
model = PPO("MlpPolicy", gymnasium.make("BiScale/Decode-v1", episode_s=5.0), n_steps=64)
model.learn(64)
"""
    done = without(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("arguments", [("hw", "doctor"), ("hw", "restore", "--all")])
@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_hardware_says_that_it_needs_linux(arguments, platform, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys, "argv", ["biscale", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Linux" in said
    assert said.count("\n") == 1


def test_a_command_puts_signals_and_warnings_back(monkeypatch, capsys):
    handlers = {number: signal.getsignal(number) for number in ending_signals()}
    shown, filters = warnings.showwarning, list(warnings.filters)
    monkeypatch.setattr(sys, "argv", ["biscale", "traces", "list"])
    with pytest.raises(SystemExit):
        main()
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert warnings.showwarning is shown
    assert warnings.filters == filters
    with polite_process():
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        warnings.warn("mind the gap", BiscaleWarning, stacklevel=1)
    assert "biscale: mind the gap\n" in capsys.readouterr().err


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with polite_process():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_it_can_be_called_from_another_thread():
    caught = []

    def call():
        try:
            with polite_process():
                pass
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert caught == []


def test_memory_is_told_where_the_system_tells_it(monkeypatch):
    assert 10 < day.peak_memory_mb() < 1e6
    monkeypatch.setitem(sys.modules, "resource", None)
    assert day.peak_memory_mb() != day.peak_memory_mb()
