"""Whole files and locks, against a full disk, a failing writer and a killed process."""

import ast
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.core import files
from biscale_env.core.errors import BiscaleError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@given(content=st.binary(max_size=50) | st.text(max_size=50), before=st.none() | st.binary())
def test_content_arrives_as_it_was_given(tmp_path_factory, content, before) -> None:
    target = tmp_path_factory.mktemp("files") / "a.txt"
    if before is not None:
        target.write_bytes(before)
    try:
        expected = content.encode() if isinstance(content, str) else content
    except UnicodeEncodeError:
        with pytest.raises(UnicodeEncodeError):
            files.write_whole(target, content)
        assert names(target.parent) == ([] if before is None else ["a.txt"])
        return
    files.write_whole(target, content)
    assert target.read_bytes() == expected
    assert names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, OSError("no reason")])
def test_any_failure_leaves_the_old_file_and_no_debris(tmp_path, failure, durable) -> None:
    target = tmp_path / "a.txt"
    files.write_whole(target, "first", durable=durable)

    def broken() -> None:
        with files.open_whole(target, durable=durable) as temporary:
            temporary.write_text("half of the sec")
            assert target.read_text() == "first"
            assert temporary.parent == target.parent
            raise failure

    with pytest.raises(type(failure) if isinstance(failure, OSError) else failure):
        broken()
    assert target.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]
    files.write_whole(target, "second", durable=durable)
    assert target.read_text() == "second"


def test_the_temporary_file_keeps_the_suffix_that_writers_look_at(tmp_path) -> None:
    with files.open_whole(tmp_path / "rows.csv.gz") as temporary:
        assert temporary.name.endswith(".rows.csv.gz")
        assert temporary.name.startswith(".")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, mode) -> None:
    before = os.umask(umask)
    try:
        files.write_whole(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_a_link_is_followed_and_stays_a_link(tmp_path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    files.write_whole(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "x"
    assert names(tmp_path / "there") == ["file"]


def test_a_pipe_is_written_into_and_not_replaced(tmp_path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    files.write_whole(pipe, "through")
    reader.join(timeout=10)
    assert read == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_errors_name_the_file_and_not_the_temporary_one(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        files.write_whole(tmp_path / "folder", "x")
    assert error.value.filename == str(tmp_path / "folder")
    with pytest.raises(FileNotFoundError) as error:
        files.write_whole(tmp_path / "none" / "a", "x")
    assert error.value.filename == str(tmp_path / "none" / "a")
    with pytest.raises(FileNotFoundError) as error, files.open_whole(tmp_path / "a"):
        (tmp_path / "other").read_text()
    assert error.value.filename == str(tmp_path / "other")


def test_an_error_without_a_name_is_given_one_and_keeps_its_reason() -> None:
    full = OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28]")
    with pytest.raises(OSError, match="left on device: 'a/b'") as error, files.naming("a/b"):
        raise full
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="odd: 'a'"), files.naming("a"):
        raise OSError("odd")
    with pytest.raises(PermissionError) as denied, files.naming("a"):
        raise PermissionError(errno.EACCES, "no", "b")
    assert denied.value.filename == "b"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_file_and_is_named(tiny_disk) -> None:
    target = tiny_disk / "a.bin"
    files.write_whole(target, b"old")
    with pytest.raises(OSError, match="No space left on device") as error:
        files.write_whole(target, bytes(1_000_000))
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(target))
    assert target.read_bytes() == b"old"
    assert names(tiny_disk) == ["a.bin"]


def test_a_full_disk_under_a_parquet_file_is_named_too(tiny_disk) -> None:
    import numpy as np
    import pandas as pd

    frame = pd.DataFrame({"a": np.random.default_rng(0).random(100_000)})
    target = tiny_disk / "a.parquet"
    with pytest.raises(OSError, match="No space") as error, files.open_whole(target) as temporary:
        frame.to_parquet(temporary)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(target))
    assert names(tiny_disk) == []


def test_debris_of_a_killed_writer_is_found_and_nothing_else(tmp_path) -> None:
    for name in (".a1b2c3d4.a.txt", ".a1b2c3d4.b.txt", "a.txt", ".hidden.a.txt", ".a.txt"):
        (tmp_path / name).write_text("")
    writer = files.open_whole(tmp_path / "a.txt")
    living = writer.__enter__()
    assert set(files.debris(tmp_path, "a.txt")) == {tmp_path / ".a1b2c3d4.a.txt", living}
    writer.__exit__(None, None, None)


def test_a_lock_excludes_a_second_holder_until_it_is_released(tmp_path) -> None:
    path = tmp_path / ".lock"
    with files.lock(path):
        with pytest.raises(BiscaleError, match=r"\.lock is in use"), files.lock(path):
            pytest.fail("two holders")
        with pytest.raises(BiscaleError, match=r"^the run is in use"):
            files.lock(path, what="the run").__enter__()
    with files.lock(path), files.lock(tmp_path / "other"):
        pass
    with pytest.raises(ZeroDivisionError), files.lock(path):
        1 / 0  # noqa: B018
    with files.lock(path):
        pass


def test_a_lock_can_be_waited_for(tmp_path) -> None:
    path, entered, leave = tmp_path / ".lock", threading.Event(), threading.Event()

    def hold() -> None:
        with files.lock(path):
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(10)
    threading.Timer(0.1, leave.set).start()
    with files.lock(path, timeout_s=10):
        assert leave.is_set()
    holder.join()


def test_a_killed_holder_keeps_no_lock(tmp_path) -> None:
    path = tmp_path / ".lock"
    code = (
        "import sys, time; from biscale_env.core.files import lock\n"
        f"with lock({str(path)!r}): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(BiscaleError, match="in use by another process"), files.lock(path):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    with files.lock(path):
        pass


def test_a_lock_that_cannot_be_made_is_an_error_that_names_it(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file") as error, files.lock(tmp_path / "file" / ".lock"):
        pass
    assert str(tmp_path / "file") in str(error.value.filename)


ROOT = Path(__file__).resolve().parents[2]
MAKERS = {"mkstemp", "NamedTemporaryFile", "savefig", "to_parquet"}
ALLOWED = {"biscale_env/core/files.py", "biscale_env/traces/partial_file.py"}


def by_hand(source: str) -> list[int]:
    """Lines that write or replace a file by another way than this module's."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, target = node.func.attr, node.func.value
        owner = target.id if isinstance(target, ast.Name) else ""
        first = ast.unparse(node.args[0]) if node.args else ""
        if (
            (name == "replace" and owner == "os")
            or (name in ("write_text", "write_bytes") and owner != "temporary")
            or (name in MAKERS and first.split(" / ")[0] not in ("temporary", "folder"))
        ):
            found.append(node.lineno)
    return found


def test_nothing_else_writes_files_by_hand() -> None:
    assert by_hand("os.replace(a, b)\nx.write_text(y)\nf.savefig(path)\ntempfile.mkstemp()") == [
        1, 2, 3, 4,
    ]  # fmt: skip
    sources = [
        p
        for top in ("biscale_env", "controllers", "agents")
        for p in ROOT.joinpath(top).rglob("*.py")
    ]
    assert len(sources) > 200
    found = {
        name: lines
        for path in sources
        if (name := path.relative_to(ROOT).as_posix()) not in ALLOWED
        and (lines := by_hand(path.read_text(encoding="utf-8")))
    }
    assert found == {}
