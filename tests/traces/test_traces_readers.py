"""Readers and writers: every format, exact times, streaming."""

import gzip
import json
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.traces import Trace, iter_trace, read_trace, write_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.9799600,4808,10
2023-11-17 00:00:00.0319601,3180,8
2023-11-17 00:00:01,110,27"""


def file(tmp_path, text, name="trace.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def made(n=500, seed=0):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(0.2, n))
    return Trace(
        "made",
        times,
        rng.integers(1, 9000, n),
        rng.integers(1, 900, n),
        "test",
        duration_s=times[-1] + 1,
    )


def test_azure_2023_with_hundred_nanosecond_stamps(tmp_path):
    trace = read_trace(file(tmp_path, AZURE))
    np.testing.assert_allclose(trace.arrival_s, [0.0, 0.0520001, 1.02004], rtol=0, atol=1e-9)
    assert trace.prompt_tokens.tolist() == [4808, 3180, 110]
    assert trace.output_tokens.tolist() == [10, 8, 27]
    assert (trace.name, trace.first_line) == ("trace", 2)
    assert str(tmp_path) in trace.source


@pytest.mark.parametrize("zone", ["+00:00", "Z"])
def test_azure_2024_with_zone(tmp_path, zone):
    text = (
        AZURE.replace("9600,", f"960{zone},")
        .replace("9601,", f"960{zone},")
        .replace(":01,", f":01{zone},")
    )
    trace = read_trace(file(tmp_path, text))
    np.testing.assert_allclose(trace.arrival_s, [0.0, 0.052, 1.02004], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "change", [lambda t: t.replace("\n", "\r\n"), lambda t: "\ufeff" + t, lambda t: t + "\n"]
)
def test_line_ends_and_byte_order_mark(tmp_path, change):
    assert read_trace(file(tmp_path, change(AZURE))) == read_trace(
        file(tmp_path, AZURE, "plain.csv")
    )


def test_compressed_and_unknown_suffixes(tmp_path):
    plain = read_trace(file(tmp_path, AZURE))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(AZURE.encode()))
    assert read_trace(tmp_path / "a.csv.gz") == plain
    assert read_trace(tmp_path / "a.csv.gz").name == "a"
    assert read_trace(file(tmp_path, AZURE, "noname")) == plain
    assert read_trace(file(tmp_path, MOONCAKE, "log.txt")).rate_rps == pytest.approx(3 / 27.482)


MOONCAKE = "\n".join(
    json.dumps({"timestamp": t, "input_length": i, "output_length": o, "hash_ids": list(range(h))})
    for t, i, o, h in [(0, 6758, 500, 14), (3000, 7322, 490, 15), (27482, 7237, 794, 0)]
)


def test_mooncake_is_in_milliseconds_and_hash_ids_stay_out(tmp_path):
    trace = read_trace(file(tmp_path, MOONCAKE, "m.jsonl"))
    assert trace.arrival_s.tolist() == [0.0, 3.0, 27.482]
    assert trace.prompt_tokens.tolist() == [6758, 7322, 7237]
    assert trace.output_tokens.tolist() == [500, 490, 794]


def test_blank_lines_in_json_lines_are_skipped(tmp_path):
    text = MOONCAKE.replace("\n", "\n\n") + "\n"
    assert read_trace(file(tmp_path, text, "b.jsonl")) == read_trace(
        file(tmp_path, MOONCAKE, "m.jsonl")
    )


@pytest.mark.parametrize(("unit", "scale"), [("s", 1), ("ms", 1e3), ("us", 1e6), ("ns", 1e9)])
def test_named_columns_and_units(tmp_path, unit, scale):
    frame = pd.DataFrame(
        {
            "when": np.array([1, 2.5, 7]) * scale,
            "in": [5, 6, 7],
            "out": [1, 2, 3],
            "user": ["a", "b", "c"],
        }
    )
    frame.to_csv(tmp_path / "g.csv", index=False)
    frame.to_parquet(tmp_path / "g.parquet")
    options = {
        "time_column": "when",
        "prompt_column": "in",
        "output_column": "out",
        "time_unit": unit,
    }
    for name in ("g.csv", "g.parquet"):
        trace = read_trace(tmp_path / name, **options)
        np.testing.assert_allclose(trace.arrival_s, [1, 2.5, 7])
        assert trace.prompt_tokens.tolist() == [5, 6, 7]


def test_one_renamed_column_is_enough(tmp_path):
    path = file(tmp_path, AZURE.replace("ContextTokens", "Prompt"))
    assert read_trace(path, prompt_column="Prompt") == read_trace(
        file(tmp_path, AZURE, "plain.csv")
    )


def test_dates_and_unix_times_count_from_the_first_request_other_numbers_do_not(tmp_path):
    columns = {"input_length": [5, 6], "output_length": [1, 2]}
    epoch = pd.DataFrame({"timestamp": [1_700_000_000_000, 1_700_000_002_500], **columns})
    epoch.to_json(tmp_path / "unix.jsonl", orient="records", lines=True)
    assert read_trace(tmp_path / "unix.jsonl").arrival_s.tolist() == [0.0, 2.5]
    dates = pd.DataFrame(
        {"timestamp": pd.to_datetime(["2024-01-01 00:00:01.0", "2024-01-01 00:00:03.5"]), **columns}
    )
    dates.to_parquet(tmp_path / "dates.parquet")
    assert read_trace(tmp_path / "dates.parquet").arrival_s.tolist() == [0.0, 2.5]
    assert read_trace(
        file(tmp_path, "arrival_s,prompt_tokens,output_tokens\n5,1,1\n6,1,1\n")
    ).arrival_s.tolist() == [
        5,
        6,
    ]


def test_output_of_zero_tokens_is_read_as_one_and_counted(tmp_path):
    trace = read_trace(file(tmp_path, AZURE.replace(",27", ",0")))
    assert trace.output_tokens.tolist() == [10, 8, 1]
    assert trace.source.endswith("; 1 outputs of 0 tokens read as 1")


def test_unsorted_file_on_request(tmp_path):
    lines = AZURE.split("\n")
    path = file(tmp_path, "\n".join([lines[0], lines[3], lines[1], lines[2]]))
    with pytest.raises(BiscaleError, match="line 3: TIMESTAMP lies"):
        read_trace(path)
    by_time, plain = read_trace(path, sort=True), read_trace(file(tmp_path, AZURE, "plain.csv"))
    np.testing.assert_allclose(by_time.arrival_s, plain.arrival_s, rtol=0, atol=1e-9)
    assert by_time.prompt_tokens.tolist() == plain.prompt_tokens.tolist()
    negative = file(tmp_path, "arrival_s,prompt_tokens,output_tokens\n5,1,1\n-6,1,1\n", "n.csv")
    with pytest.raises(BiscaleError, match="line 3: arrival_s is -6 s"):
        read_trace(negative, sort=True)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_written_traces_read_back(tmp_path, suffix):
    trace = made()
    back = read_trace(write_trace(trace, tmp_path / f"made{suffix}"))
    assert back.prompt_tokens.tolist() == trace.prompt_tokens.tolist()
    assert back.output_tokens.tolist() == trace.output_tokens.tolist()
    if suffix == ".jsonl":
        np.testing.assert_allclose(back.arrival_s, trace.arrival_s, rtol=0, atol=1e-9)
    else:
        assert (back.arrival_s == trace.arrival_s).all()
    assert back.duration_s == (trace.duration_s if suffix == ".parquet" else back.arrival_s[-1])
    assert [p.name for p in tmp_path.iterdir()] == [f"made{suffix}"]


@given(st.lists(st.floats(0, 1e7), min_size=1, max_size=30))
@settings(max_examples=30)
def test_csv_keeps_every_time_to_the_last_bit(tmp_path_factory, times):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    n = len(times)
    trace = Trace("t", np.sort(times), np.ones(n, int), np.ones(n, int), "test")
    assert (read_trace(write_trace(trace, path)).arrival_s == trace.arrival_s).all()


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    target = file(tmp_path, "precious", "t.csv")

    def fail(self, path, **_):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(BiscaleError, match="No space left on device"):
        write_trace(made(3), target)
    assert target.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(BiscaleError, match="must end in"):
        write_trace(made(3), tmp_path / "t.xlsx")
    with pytest.raises(BiscaleError, match="cannot write"):
        write_trace(made(3), tmp_path / "missing" / "t.parquet")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("window_s", [0.7, 13.0, 1e6])
def test_windows_of_a_stream_are_the_windows_of_the_trace(tmp_path, suffix, window_s):
    path = write_trace(made(), tmp_path / f"made{suffix}")
    whole = read_trace(path)
    windows = list(iter_trace(path, window_s))
    assert len(windows) == int(whole.arrival_s[-1] // window_s) + 1
    assert sum(len(w) for w in windows) == len(whole)
    for k, window in enumerate(windows):
        low, high = k * window_s, (k + 1) * window_s
        inside = (whole.arrival_s >= low) & (whole.arrival_s < high)
        assert window.prompt_tokens.tolist() == whole.prompt_tokens[inside].tolist()
        np.testing.assert_allclose(window.arrival_s, whole.arrival_s[inside] - low, atol=1e-9)
        assert window.duration_s <= window_s


def test_stream_yields_quiet_windows_too(tmp_path):
    path = file(tmp_path, "arrival_s,prompt_tokens,output_tokens\n0,1,1\n35,2,2\n")
    assert [(len(w), w.duration_s) for w in iter_trace(path, 10.0)] == [
        (1, 10.0),
        (0, 10.0),
        (0, 10.0),
        (1, 5.0),
    ]
    with pytest.raises(BiscaleError, match="positive time"):
        next(iter_trace(path, 0.0))


def test_stream_crosses_read_blocks_and_counts_lines_there(tmp_path, monkeypatch):
    monkeypatch.setattr("biscale_env.traces.rows.raw_columns.BLOCK_BYTES", 2000)
    path = write_trace(made(2000), tmp_path / "t.csv")
    assert sum(len(w) for w in iter_trace(path, 5.0)) == 2000
    lines = path.read_text().splitlines()
    for line, row, words in [
        (1501, "1.0,1,1", "lies"),
        (1777, "{},0,1", "prompt_tokens is 0"),
        (1900, "{},x,1", "'x'"),
    ]:
        row = row.format(lines[line - 1].split(",")[0])
        bad = file(tmp_path, "\n".join([*lines[: line - 1], row, *lines[line:]]), "bad.csv")
        with pytest.raises(BiscaleError, match=rf"bad.csv, line {line}: .*{words}"):
            list(iter_trace(bad, 5.0))


def test_real_azure_files(shared_data):
    conv = read_trace(shared_data / "traces" / "AzureLLMInferenceTrace_conv_2023.csv")
    code = read_trace(shared_data / "traces" / "AzureLLMInferenceTrace_code_2023.csv")
    assert (len(conv), len(code)) == (19366, 8819)
    assert conv.duration_s == pytest.approx(3501.721937, abs=1e-6)
    assert conv.rate_rps == pytest.approx(5.53, abs=0.005)
    assert code.rate_rps == pytest.approx(2.57, abs=0.005)
    assert conv.prompt_tokens.mean() == pytest.approx(1155, abs=1)
    assert np.quantile(code.prompt_tokens, 0.99) == pytest.approx(7436, abs=1)
    conv.check_fits(16_384)
    with pytest.raises(
        BiscaleError, match=r"AzureLLMInferenceTrace_conv_2023.csv, line \d+: prompt_tokens"
    ):
        conv.check_fits(8192)


def test_a_million_rows_are_read_in_two_seconds(tmp_path):
    """Of computing time; it takes about a tenth of that."""
    n = 1_000_000
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "TIMESTAMP": (np.cumsum(rng.exponential(0.05, n)) * 1e6).astype("datetime64[us]"),
            "ContextTokens": rng.integers(1, 5000, n),
            "GeneratedTokens": rng.integers(0, 500, n),
        }
    )
    pa.csv.write_csv(table, tmp_path / "million.csv")
    started = time.process_time()
    assert len(read_trace(tmp_path / "million.csv")) == n
    assert time.process_time() - started < 2.0
