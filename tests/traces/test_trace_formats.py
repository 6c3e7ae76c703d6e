"""Formats of installed packages (``biscale.trace_formats``), and files that are closed at once."""

import gc
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from biscale_env.core.errors import BiscaleError, BiscaleWarning
from biscale_env.traces import iter_trace, load_named, read_trace, write_trace
from biscale_env.traces.reading.formats import BUILT_IN, format_of, installed_formats
from biscale_env.traces.trace import Trace

MODULE = """
from biscale_env.traces.reading.formats import TraceFormat
from biscale_env.traces.rows.raw_columns import RawColumns


def batches(path, **columns):
    lines = path.read_text().splitlines()[1:]
    rows = [[float(cell) for cell in line.split("|")] for line in lines]
    for k in range(0, len(rows), 2):
        yield RawColumns.of(path, *zip(*rows[k : k + 2]), first_row=k + 1)


FORMAT = TraceFormat(lambda path, head: head.startswith(b"BURST"), batches)
OTHER = 3
"""


def install(folder: Path, points: str) -> None:
    """What pip leaves behind: a module and a dist-info folder."""
    (folder / "burst_traces.py").write_text(MODULE)
    info = folder / "burst_traces-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: burst-traces\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[biscale.trace_formats]\n{points}\n")


@pytest.fixture
def burst(tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    install(site, "burst = burst_traces:FORMAT")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "burst_traces", raising=False)
    return tmp_path


def written(folder: Path, *rows: str) -> Path:
    path = folder / "mine.csv"  # a suffix that a built-in format would take
    path.write_text("\n".join(["BURST", *rows]) + "\n")
    return path


def test_an_installed_format_is_read_by_everything_that_reads_traces(burst):
    path = written(burst, "0|100|5", "0.5|200|0", "2.5|300|7")
    trace = read_trace(path)
    assert format_of(path).name == "burst"
    assert trace.arrival_s.tolist() == [0.0, 0.5, 2.5]
    assert trace.prompt_tokens.tolist() == [100, 200, 300]
    assert trace.output_tokens.tolist() == [5, 1, 7]
    assert "1 outputs of 0 tokens read as 1" in trace.source
    assert load_named(str(path)) == trace
    assert [len(w) for w in iter_trace(path, 1.0)] == [2, 0, 1]


def test_what_it_yields_is_checked_like_any_file(burst):
    for rows, words in (
        (("0|1|1", "2|1|1", "1|1|1"), "row 3: time lies 1 s before the row above"),
        (("0|1|1", "1|0|1"), "row 2: prompt"),
        (("nan|1|1",), "row 1: time is missing"),
    ):
        with pytest.raises(BiscaleError, match=words):
            read_trace(written(burst, *rows))
    assert read_trace(written(burst, "2|1|1", "1|9|1"), sort=True).prompt_tokens.tolist() == [9, 1]


def test_a_reader_that_fails_is_one_sentence(burst):
    with pytest.raises(BiscaleError, match="installed trace format 'burst' fails: ValueError"):
        read_trace(written(burst, "0|x|1"))


def test_other_files_are_read_as_before(burst):
    trace = Trace("t", np.array([0.0, 1.0]), np.array([10, 20]), np.array([1, 2]), "made")
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = write_trace(trace, burst / f"plain{suffix}")
        assert read_trace(path) == trace
        assert format_of(path) in BUILT_IN


@pytest.mark.parametrize(
    "point", ["burst_traces:MISSING", "no_such_module:X", "burst_traces:OTHER"]
)
def test_a_broken_format_is_named_and_left_out(burst, point):
    install(burst / "site", f"broken = {point}")
    trace = Trace("t", np.array([0.0, 1.0]), np.array([10, 20]), np.array([1, 2]), "made")
    path = write_trace(trace, burst / "plain.csv")
    with pytest.warns(BiscaleWarning, match="trace format 'broken' .* is left out"):
        assert read_trace(path) == trace
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert installed_formats() == ()


def open_files(folder: Path) -> list[str]:
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    paths = [os.readlink(link) for link in links if link.is_symlink()]
    return [path for path in paths if path.startswith(str(folder))]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks into /proc")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_no_file_stays_open(tmp_path, suffix):
    """Not even while the collector sleeps and somebody holds the error."""
    n = 2000
    trace = Trace("t", np.arange(n) * 1.0, np.full(n, 10), np.full(n, 2), "made")
    path = write_trace(trace, tmp_path / f"a{suffix}")
    gc.disable()
    try:
        read_trace(path)
        assert open_files(tmp_path) == []
        windows = iter_trace(path, 10.0)
        next(windows)
        windows.close()
        assert open_files(tmp_path) == []
        if suffix != ".parquet":
            text = path.read_text().splitlines()
            path.write_text("\n".join([*text[:-1], text[0], text[-1]]) + "\n")
            with pytest.raises(BiscaleError) as caught:
                read_trace(path)
            assert caught.tb is not None
            assert open_files(tmp_path) == []
    finally:
        gc.enable()


@pytest.mark.slow
def test_reading_leaves_nothing_to_the_collector(tmp_path):
    trace = Trace("t", np.arange(5) * 1.0, np.full(5, 10), np.full(5, 2), "made")
    paths = [str(write_trace(trace, tmp_path / f"a{s}")) for s in (".csv", ".jsonl", ".parquet")]
    program = (
        "import sys\n"
        "from biscale_env.traces import read_trace\n"
        "for path in sys.argv[1:]: read_trace(path)\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "-c", program, *paths],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True,
    )  # fmt: skip
    assert "ResourceWarning" not in done.stderr
