"""The cache folder of users without a home, without rights and without space."""

import errno
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import platformdirs
import pytest
from numba.core import caching

from biscale_env.core import jit, user_cache
from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks import owner

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No warning given yet, no folder chosen, a temporary folder of its own."""
    monkeypatch.delenv(user_cache.VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    user_cache.warn_once.cache_clear()
    jit.cache_dir.cache_clear()
    yield
    user_cache.warn_once.cache_clear()
    jit.cache_dir.cache_clear()
    os.environ.pop(user_cache.VARIABLE, None)


def homeless(*_, **__):
    raise RuntimeError("could not determine the home directory")


def relative(*_, **__):
    return Path("~/.cache/biscale-env")


def test_the_variable_goes_before_the_default_and_the_default_before_the_user(
    monkeypatch, tmp_path
):
    assert user_cache.chosen_root() == platformdirs.user_cache_path("biscale-env")
    assert user_cache.chosen_root("given") == Path("given")
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path / "a"))
    assert user_cache.chosen_root("given") == tmp_path / "a" == user_cache.cache_root()
    assert not (tmp_path / "a").exists()
    assert user_cache.writable_root("given") == tmp_path / "a"
    assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize("path", [homeless, relative])
def test_without_a_home_a_private_temporary_folder_stands_in_with_one_warning(
    monkeypatch, caplog, tmp_path, path
):
    monkeypatch.setattr(platformdirs, "user_cache_path", path)
    assert user_cache.chosen_root() is None
    with caplog.at_level(logging.WARNING):
        folder = user_cache.writable_root()
        assert folder == user_cache.writable_root() == user_cache.cache_root()
    assert folder.parent == tmp_path / "temporary"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (message,) = caplog.messages
    assert (
        message
        == f"biscale: cache in {folder}, since the user has no home; BISCALE_CACHE chooses another "
        "folder"
    )
    assert os.environ[user_cache.VARIABLE] == str(folder)  # children take it without a warning


def test_a_folder_that_cannot_be_written_is_replaced_too(monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path / "file" / "below"))
    folder = user_cache.writable_root()
    assert folder.parent == tmp_path / "temporary"
    assert f"since {tmp_path / 'file' / 'below'} cannot be written" in caplog.text


@pytest.mark.parametrize("trap", ["open", "link", "file"])
def test_a_temporary_folder_that_others_may_have_prepared_is_not_taken(monkeypatch, tmp_path, trap):
    monkeypatch.setattr(platformdirs, "user_cache_path", homeless)
    prepared = tmp_path / "temporary" / f"biscale-env-{os.getuid()}"
    if trap == "open":
        prepared.mkdir()
        prepared.chmod(0o777)
    elif trap == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        prepared.symlink_to(tmp_path / "elsewhere")
    else:
        prepared.write_text("")
    folder = user_cache.writable_root()
    assert folder != prepared
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.parent == tmp_path / "temporary"


def double(x):
    return 2.0 * x


def test_kernels_compile_where_nothing_at_all_can_be_written(monkeypatch, caplog):
    def nowhere():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(platformdirs, "user_cache_path", homeless)
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert user_cache.writable_root() is None
    assert jit.cache_dir() is None
    assert jit.compiled(double)(1.5) == 3.0
    assert caplog.text.count("kernels are compiled in every process again") == 1


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Compile ``double`` into a fresh cache; returns its files."""
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path / "cache"))
    assert jit.compiled(double)(1.5) == 3.0
    found = sorted((tmp_path / "cache" / "kernels").rglob("*.nb*"))
    assert [path.suffix for path in found] == [".nbc", ".nbi"]
    return found


def hits(kernel):
    return sum(kernel.stats.cache_hits.values())


def test_a_kernel_comes_from_the_cache(cached):
    kernel = jit.compiled(double)
    assert kernel(1.5) == 3.0
    assert hits(kernel) == 1


@pytest.mark.parametrize("cut", [0, 1, 20])
@pytest.mark.parametrize("which", [0, 1])
def test_a_file_of_the_cache_that_was_cut_off_is_made_again(cached, which, cut):
    cached[which].write_bytes(cached[which].read_bytes()[:cut])
    kernel = jit.compiled(double)
    assert kernel(1.5) == 3.0
    assert hits(kernel) == 0
    again = jit.compiled(double)
    assert again(1.5) == 3.0
    assert hits(again) == 1


def test_a_full_disk_under_the_cache_is_one_warning(monkeypatch, tmp_path, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_data", full)
    kernel = jit.compiled(double)
    assert kernel(1.5) == 3.0
    assert kernel(2) == 4.0  # another signature, so compiled again
    (message,) = caplog.messages
    assert "are not kept" in message
    assert "no space left on device" in message


def test_unused_kernels_of_other_sources_are_removed(monkeypatch, tmp_path):
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path))
    old, recent, foreign = [], [], tmp_path / "kernels" / "mine"
    for k in range(jit.KEPT_FOLDERS + 3):
        folder = tmp_path / "kernels" / f"{k:016x}"
        (folder / "inside").mkdir(parents=True)
        age_s = (2 if k < 5 else 0.5) * 86_400 + k
        os.utime(folder, times=(time.time() - age_s,) * 2)
        (old if k < 5 else recent).append(folder)
    foreign.mkdir()
    os.utime(foreign, times=(0, 0))
    made = jit.cache_dir()
    assert made.is_dir()
    assert [folder.exists() for folder in old] == [True, True, False, False, False]
    assert all(folder.exists() for folder in recent)  # used today, whatever their number
    assert foreign.exists()


def test_use_today_keeps_a_folder(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, times=(0, 0))
    user_cache.mark_used(tmp_path / "a")
    user_cache.prune(tmp_path, keep=0)
    assert [path.name for path in tmp_path.iterdir() if path.name in "ab"] == ["a"]
    user_cache.prune(tmp_path / "absent", keep=0)


@pytest.mark.parametrize("content", ["", '{"a": [1, 2', "\0\0\0", None])
def test_what_cannot_be_recalled_is_absent(tmp_path, content):
    path = tmp_path / "below" / "a.json"
    if content is not None:
        path.parent.mkdir()
        path.write_text(content)
    assert user_cache.recall(path) is None
    user_cache.remember(path, json.dumps({"a": 1}))
    assert user_cache.recall(path) == {"a": 1}


def test_what_cannot_be_kept_is_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    for _ in range(2):
        user_cache.remember(tmp_path / "file" / "a.json", "{}")
    (message,) = caplog.messages
    assert "not kept in the cache" in message


def test_owner_notes_without_a_home_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.delenv(owner.VARIABLE, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    for path in (homeless, relative):
        monkeypatch.setattr(platformdirs, "user_state_path", path)
        with pytest.raises(BiscaleError, match="this user has no home: set BISCALE_HW_STATE"):
            owner.state_dir()


def as_stranger(folder, arguments, **environment):
    """Run a command as a user without an entry in the password file, who may read everything."""
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root can run as another user")
    drop = ["--reuid", "12345", "--regid", "12345", "--clear-groups"]
    capability = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    folder.chmod(0o777)
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    return subprocess.run(
        ["setpriv", *drop, *capability, sys.executable, "-m", "biscale_env.cli", *arguments],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("home", [{"HOME": "/"}, {}])
def test_traces_are_listed_to_a_user_without_a_home(tmp_path, home):
    found = as_stranger(tmp_path, ["traces", "list"], **home)
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
@pytest.mark.parametrize("home", [{"HOME": "/"}, {}])
def test_kernels_run_for_a_user_without_a_home(tmp_path, home):
    ask = ["predict", "prefill", "--tokens", "2048", "--requests", "1", "--tp", "4"]
    ask += ["--clock", "1980"]
    found = as_stranger(tmp_path, ask, **home)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("\n") == 1, found.stderr
    assert f"cache in {tmp_path / 'biscale-env-12345'}, since" in found.stderr
    assert list((tmp_path / "biscale-env-12345" / "kernels").rglob("*.nbc"))
    again = as_stranger(tmp_path, ask, **home)
    assert again.stdout == found.stdout


def test_traces_too_go_to_the_temporary_folder_where_the_home_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "file" / "cache"  # below a file: no folder can be made, not even by root
    closed.parent.write_text("")
    monkeypatch.delenv(user_cache.VARIABLE, raising=False)
    monkeypatch.setattr(user_cache.platformdirs, "user_cache_path", lambda *_, **__: closed)
    monkeypatch.setattr(user_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    assert user_cache.cache_root().parent == tmp_path
    monkeypatch.setenv(user_cache.VARIABLE, str(closed))
    assert user_cache.cache_root() == closed, "what the user named is not replaced"
