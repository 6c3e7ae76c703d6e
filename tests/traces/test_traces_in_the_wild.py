"""Files as people have them: every known format, however it is written, gives the right numbers.

The rows are invented; their shapes are those of the public files.
"""

import bz2
import gzip
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from trace_files import lines, written

from biscale_env.core.errors import BiscaleError, BiscaleWarning
from biscale_env.traces import Trace, iter_trace, read_trace, write_trace
from biscale_env.traces.reading.readers import load_file

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-11 07:00:00.250000+00:00,900,12\n"
    "2024-05-11 07:00:01.000000+00:00,41,300\n"
    "2024-05-11 07:00:04.250000+00:00,7000,5\n"
)
EXPECTED = ([0.0, 0.75, 4.0], [900, 41, 7000], [12, 300, 5])


def numbers(trace):
    return (
        np.round(trace.arrival_s, 9).tolist(),
        trace.prompt_tokens.tolist(),
        trace.output_tokens.tolist(),
    )


def mooncake(t, i=64, o=8, **more):
    return {"timestamp": t, "input_length": i, "output_length": o, **more}


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


WRITTEN = {
    "plain": AZURE,
    "semicolons": AZURE.replace(",", ";"),
    "tabs": AZURE.replace(",", "\t"),
    "bars": AZURE.replace(",", "|"),
    "CRLF": AZURE.replace("\n", "\r\n"),
    "byte order mark": b"\xef\xbb\xbf" + AZURE.encode(),
    "UTF-16": AZURE.replace(",", "\t").encode("utf-16"),
    "no newline at the end": AZURE.rstrip("\n"),
    "one blank line at the end": AZURE + "\n",
    "many blank lines at the end": AZURE + "\n\n\r\n\n",
    "spaces at the end": AZURE + "   \n",
    "empty fields at the end": AZURE + ",,\n,,\n",
    "blank lines and a comment first": "\n# exported\n" + AZURE,
    "separator named": "sep=;\n" + AZURE.replace(",", ";"),
    "upper case": AZURE.replace("ContextTokens", "CONTEXTTOKENS").replace("Gen", "GEN"),
    "lower case, spaced": AZURE.replace("ContextTokens", "context tokens").replace(
        "GeneratedTokens", "generated_tokens"
    ),
    "quoted": "\n".join(
        ",".join(f'"{cell}"' for cell in row.split(",")) for row in AZURE.splitlines()
    ),
    "other order, further columns": "n,GeneratedTokens,model,ContextTokens,TIMESTAMP\n"
    + "".join(
        f'{k},{o},"a, ""b"" {k}",{p},{t}\n'
        for k, (t, p, o) in enumerate(row.split(",") for row in AZURE.splitlines()[1:])
    ),
    "an index column": "\n".join(
        f"{k - 1 if k else ''},{row}" for k, row in enumerate(AZURE.splitlines())
    ),
    "seven digits, no zone": AZURE.replace("0000+00:00", "00000"),
    "a Z": AZURE.replace("+00:00", "Z"),
    "a T": AZURE.replace("11 07", "11T07"),
    "another zone": AZURE.replace("07:00:", "09:00:").replace("+00:00", "+02:00"),
    "whole seconds without digits": AZURE.replace("01.000000+", "01+"),
    "line breaks inside a field": AZURE.replace("Tokens\n", "Tokens,note\n", 1)
    .replace(",12\n", ',12,"a\nb"\n')
    .replace(",300\n", ",300,x\n")
    .replace(",5\n", ",5,y\n"),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_azure_however_it_is_written(tmp_path, how):
    loaded = load_file(written(tmp_path, WRITTEN[how]))
    assert numbers(loaded.trace) == EXPECTED
    assert loaded.recognised.format == "Azure 2023/2024"
    assert loaded.recognised.time_unit == "dates"
    assert [len(w) for w in iter_trace(tmp_path / "t.csv", 2.0)] == [2, 0, 1]


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("t.csv.gz", gzip.compress),
        ("t.csv.bz2", bz2.compress),
        ("t.csv.zst", zstd),
        ("t.csv.xz", lzma.compress),
        ("t.csv", gzip.compress),  # the name says nothing
        ("t", zstd),
        ("two-parts.gz", lambda d: gzip.compress(d[:60]) + gzip.compress(d[60:])),
    ],
)
def test_compressed_files_are_known_by_their_content(tmp_path, name, pack):
    assert numbers(read_trace(written(tmp_path, pack(AZURE.encode()), name))) == EXPECTED


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04rest", "zip archive or a workbook: unpack it, or save the trace as CSV"),
        (b"\xff\xfe", "is empty"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens", "holds a header but no request"),
        (b"TIMESTAMP,ContextTokens,GeneratedTokens\n\n\n", "holds a header but no request"),
        (b"1.5,20,30\n2.5,20,30\n", r"a row, no header\?"),
        (b"ContextTokens,GeneratedTokens\n5,6\n", "lengths but no arrival time.*--time-column"),
        (b"num_prefill_tokens,num_decode_tokens\n5,6\n", "lengths but no arrival time"),
    ],
)
def test_what_is_no_trace_is_one_sentence(tmp_path, content, words):
    with pytest.raises(BiscaleError, match=words) as caught:
        read_trace(written(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_decimal_commas_of_spreadsheets(tmp_path):
    text = "arrived_at;num_prefill_tokens;num_decode_tokens\n0,0;30;4\n0,25;40;5\n1,5;50;6\n"
    assert numbers(read_trace(written(tmp_path, text))) == (
        [0.0, 0.25, 1.5],
        [30, 40, 50],
        [4, 5, 6],
    )


FORMATS = {
    "BurstGPT": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "7,ChatGPT,300,20,320,API log\n9,GPT-4,200,0,200,API log\n12,GPT-4,100,30,130,API log\n",
        ([0, 2, 5], [300, 200, 100], [20, 1, 30], 7.0, 1),
    ),
    "BurstGPT with sessions": (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
        "Log Type\n7.5,a,,GPT-4,300,20,320,x\n9,,3.5,GPT-4,200,10,210,x\n",
        ([0, 1.5], [300, 200], [20, 10], 7.5, 0),
    ),
    "splitwise-sim": (
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,"
        "token_size\n0,2,0,0.0,1,300,20\n1,2,0,1.5,1,200,10\n",
        ([0, 1.5], [300, 200], [20, 10], 0.0, 0),
    ),
    "Vidur": (
        "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,300,20\n2.0,200,10\n",
        ([0, 1.5], [300, 200], [20, 10], 0.5, 0),
    ),
    "ServeGen": (
        "request_id,timestamp,input_tokens,output_tokens\n0,0.5,300,20\n1,20.5,200,10\n",
        ([0, 20], [300, 200], [20, 10], 0.5, 0),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", [str, str.upper])
def test_tables_of_simulators_and_traces_are_in_seconds(tmp_path, name, case):
    text, (times, prompts, outputs, offset_s, zeros) = FORMATS[name]
    header, _, rest = text.partition("\n")
    loaded = load_file(written(tmp_path, f"{case(header)}\n{rest}"))
    assert numbers(loaded.trace) == (times, prompts, outputs)
    found = loaded.recognised
    assert name.startswith(found.format)
    assert (found.time_unit, found.offset_s, found.zero_outputs) == ("s", offset_s, zeros)


def test_a_slice_counts_from_its_first_request_and_says_so(tmp_path):
    text = FORMATS["BurstGPT"][0].replace("\n7,", "\n700007,").replace("\n9,", "\n700009,")
    loaded = load_file(written(tmp_path, text.replace("\n12,", "\n700012,")))
    assert loaded.trace.duration_s == 5.0
    assert loaded.recognised.offset_s == 700007.0
    assert "offset of 700007 s removed: times count from the first request" in (
        loaded.recognised.sentence()
    )


QWEN = {"chat_id": 5, "parent_chat_id": -1, "type": "text", "turn": 1, "hash_ids": [1]}


@pytest.mark.parametrize(
    ("rows", "unit", "times"),
    [
        ([mooncake(0), mooncake(3000), mooncake(4500)], "ms", [0, 3, 4.5]),
        ([mooncake(0, hash_ids=[1]), mooncake(3000, hash_ids=[])], "ms", [0, 3]),
        ([mooncake(50.125, **QWEN), mooncake(51.5, **QWEN)], "s", [0, 1.375]),
        ([mooncake(0.5, type="text"), mooncake(60.5, type="search")], "s", [0, 60]),
        # a handful of rows out of two hours: still the documented unit
        ([mooncake(50.125, **QWEN), mooncake(9000.25, **QWEN)], "s", [0, 8950.125]),
        # whole numbers and fractions the other way round: only the rate is left, and decides
        ([mooncake(k // 2, **QWEN) for k in range(6)], "s", [0, 0, 1, 1, 2, 2]),
        ([mooncake(k // 2) for k in range(6)], "s", [0, 0, 1, 1, 2, 2]),
        ([mooncake(0.5), mooncake(0.75)], "s", [0, 0.25]),
        # Unix times
        ([mooncake(1_700_000_000_000), mooncake(1_700_000_002_500)], "ms", [0, 2.5]),
        ([mooncake(1_700_000_000), mooncake(1_700_000_002)], "s", [0, 2]),
        ([mooncake(1_700_000_000_000_000), mooncake(1_700_000_002_500_000)], "us", [0, 2.5]),
        ([mooncake("2024-05-11T07:00:00Z"), mooncake("2024-05-11T07:00:02.5Z")], "dates", [0, 2.5]),
    ],
)
def test_mooncake_and_qwen_bailian_share_keys_but_not_the_unit(tmp_path, rows, unit, times):
    loaded = load_file(written(tmp_path, lines(*rows), "t.jsonl"))
    assert (loaded.recognised.time_unit, loaded.trace.arrival_s.tolist()) == (unit, times)
    whole = "[\n" + ",\n".join(json.dumps(row, indent=1) for row in rows) + "\n]"
    assert load_file(written(tmp_path, whole, "t.json")).trace == loaded.trace


@pytest.mark.parametrize(
    "rows",
    [
        [mooncake(100.5), mooncake(300.25)],
        [mooncake(61, **QWEN), mooncake(77, **QWEN), mooncake(90, **QWEN)],
        [mooncake(0), mooncake(2), mooncake(9)],
    ],
)
def test_two_plausible_units_are_refused(tmp_path, rows):
    path = written(tmp_path, lines(*rows), "t.jsonl")
    with pytest.raises(BiscaleError, match=r"unit of timestamp is not certain.*--time-unit"):
        read_trace(path)
    step = rows[1]["timestamp"] - rows[0]["timestamp"]
    assert read_trace(path, time_unit="s").arrival_s[1] == step
    assert read_trace(path, time_unit="ms").arrival_s[1] == pytest.approx(step / 1000)


@pytest.mark.parametrize(
    ("column", "values", "unit"),
    [
        ("arrival_time", [0, 0.25, 1.5], "s"),
        ("arrival_ms", [0, 250, 1500], "ms"),
        ("start_time_ms", [10, 260, 1510], "ms"),
        ("timestamp", [1.7e9, 1.7e9 + 0.25, 1.7e9 + 1.5], "s"),
        ("timestamp", [1.7e12, 1.7e12 + 250, 1.7e12 + 1500], "ms"),
        ("timestamp", [1.7e15, 1.7e15 + 250e3, 1.7e15 + 1500e3], "us"),
        ("arrived_at", [1.7e12, 1.7e12 + 250, 1.7e12 + 1500], "ms"),
        ("created_at", [2**40 * 1_600_000, 2**40 * 1_600_000 + 0.25e9], "ns"),
    ],
)
def test_usual_spellings_and_units_that_the_numbers_prove(tmp_path, column, values, unit):
    rows = "".join(f"{value!r},9,{k + 2}\n" for k, value in enumerate(values))
    loaded = load_file(written(tmp_path, f"{column},input_tokens,completion_tokens\n{rows}"))
    assert loaded.recognised.time_unit == unit
    expected = [0, 0.25, 1.5][: len(values)]
    np.testing.assert_allclose(loaded.trace.arrival_s, expected, atol=1e-6)


def test_a_unit_that_nothing_proves_is_refused(tmp_path):
    path = written(tmp_path, "ts,prompt_len,output_len\n0,5,5\n40,5,5\n90,5,5\n")
    with pytest.raises(BiscaleError, match=r"0\.0222 requests/s \(in s\) or 22\.2 .*\(in ms\)"):
        read_trace(path)
    assert read_trace(path, time_unit="ms").duration_s == 0.09


def test_implausible_rates_are_a_warning(tmp_path):
    rows = "".join(f"{0.0001 * k},5,5\n" for k in range(10))
    with pytest.warns(BiscaleWarning, match=r"1.*e\+04 requests/s, above 1,000 a second"):
        read_trace(written(tmp_path, "arrived_at,num_prefill_tokens,num_decode_tokens\n" + rows))
    with pytest.warns(BiscaleWarning, match="below one an hour.*--time-unit"):
        read_trace(
            written(tmp_path, lines(mooncake(0.5, **QWEN), mooncake(9e5 + 0.5, **QWEN)), "t.jsonl")
        )


def test_our_own_json_lines_say_their_unit(tmp_path):
    trace = Trace("t", [0.1234567, 100.0, 250.5], [1, 2, 3], [4, 5, 6], "test")
    path = write_trace(trace, tmp_path / "t.jsonl")
    np.testing.assert_allclose(read_trace(path).arrival_s, trace.arrival_s, atol=1e-9)
    whole = Trace("t", [0.0, 0.005, 250.0], [1, 2, 3], [4, 5, 6], "test")
    text = write_trace(whole, tmp_path / "w.jsonl").read_text()
    assert "time_unit" not in text  # plain Mooncake
    assert read_trace(tmp_path / "w.jsonl") == whole


def test_lines_of_several_megabytes(tmp_path):
    long = "x" * 3_000_000
    rows = [mooncake(0), mooncake(10, text=long), mooncake(20), mooncake(30, text=long)]
    path = written(tmp_path, lines(*rows), "t.jsonl")
    assert numbers(read_trace(path)) == ([0, 0.01, 0.02, 0.03], [64] * 4, [8] * 4)
    assert len(read_trace(written(tmp_path, json.dumps(rows), "t.json"))) == 4
    table = "arrived_at,text,num_prefill_tokens,num_decode_tokens\n" + "".join(
        f'{k},"{long if k % 2 else k}",{k + 1},5\n' for k in range(5)
    )
    assert read_trace(written(tmp_path, table)).prompt_tokens.tolist() == [1, 2, 3, 4, 5]


def test_long_lines_late_in_a_file_repeat_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr("biscale_env.traces.rows.raw_columns.BLOCK_BYTES", 2000)
    rows = [mooncake(100 * k, i=k + 1) for k in range(500)]
    for k in (0, 300, 499):
        rows[k]["hash_ids"] = list(range(3000))
    assert read_trace(written(tmp_path, lines(*rows), "t.jsonl")).prompt_tokens.tolist() == list(
        range(1, 501)
    )


def test_unsorted_files_name_the_option_and_sort_on_request(tmp_path):
    rows = [mooncake(900, i=3), mooncake(100, i=1), mooncake(400, i=2)]
    path = written(tmp_path, lines(*rows), "t.jsonl")
    with pytest.raises(BiscaleError, match=r"line 2: timestamp lies 0.8 s .*--sort sorts them"):
        read_trace(path)
    loaded = load_file(path, sort=True)
    assert numbers(loaded.trace) == ([0, 0.3, 0.8], [1, 2, 3], [8, 8, 8])
    assert loaded.recognised.offset_s == pytest.approx(0.1)


def test_failed_requests_are_left_out_on_request(tmp_path):
    loaded = load_file(written(tmp_path, FORMATS["BurstGPT"][0]), drop_failed=True)
    assert numbers(loaded.trace) == ([0, 5], [300, 100], [20, 30])
    assert (loaded.recognised.rows_dropped, loaded.recognised.zero_outputs) == (1, 0)
    none = written(tmp_path, lines(mooncake(0, o=0), mooncake(5, o=0)), "t.jsonl")
    assert load_file(none).recognised.zero_outputs == 2
    with pytest.raises(BiscaleError, match="no request is left without the 2 rows that failed"):
        read_trace(none, drop_failed=True)
    # what is wrong in a row that stays is named with its own line
    bad = FORMATS["BurstGPT"][0].replace(",100,30,", ",-100,30,")
    with pytest.raises(BiscaleError, match="line 4: Request tokens is -100"):
        read_trace(written(tmp_path, bad), drop_failed=True)


def aiperf(start_ms, isl, osl, error=None, phase="profiling", **about):
    tokens = {"input_sequence_length": isl, "output_sequence_length": osl}
    return {
        "metadata": {
            "request_start_ns": 1_760_000_000_000_000_000 + start_ms * 1_000_000,
            "benchmark_phase": phase,
            "was_cancelled": False,
            **about,
        },
        "metrics": {
            name: {"value": value, "unit": "tokens"} for name, value in tokens.items() if value
        },
        "error": error,
    }


def test_aiperf_records(tmp_path):
    rows = [
        aiperf(0, 5, 5, phase="warmup"),
        aiperf(2000, 700, 30),  # records stand in the order of their ends
        aiperf(1000, 600, 90),
        aiperf(2500, 800, None, error={"code": 503, "message": "busy"}),
    ]
    path = written(tmp_path, lines(*rows), "profile_export.jsonl")
    with pytest.raises(BiscaleError, match=r"line 4: the request failed .*--drop-failed"):
        read_trace(path)
    loaded = load_file(path, drop_failed=True)
    assert numbers(loaded.trace) == ([0, 1.0], [600, 700], [90, 30])
    assert (loaded.recognised.format, loaded.recognised.rows_dropped) == ("AIPerf", 2)


def bench(**more):
    return {
        "date": "x",
        "num_prompts": 3,
        "request_throughput": 1.5,
        "input_lens": [30, 40, 50],
        "output_lens": [5, 0, 7],
        "ttfts": [0.1, 0.0, 0.2],
        "itls": [[0.1], [], [0.1]],
        "errors": ["", "Service Unavailable", ""],
        **more,
    }


@pytest.mark.parametrize("indent", [None, 2])
def test_results_of_vllm_bench_serve(tmp_path, indent):
    document = bench(start_times=[8123.5, 8124.0, 8126.5])
    path = written(tmp_path, json.dumps(document, indent=indent), "r.json")
    loaded = load_file(path)
    assert numbers(loaded.trace) == ([0, 0.5, 3.0], [30, 40, 50], [5, 1, 7])
    assert loaded.recognised.format == "vllm bench serve"
    assert numbers(read_trace(path, drop_failed=True)) == ([0, 3.0], [30, 50], [5, 7])


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (bench(), "without start_times.*save-detailed"),
        ({"request_throughput": 1.5, "completed": 3}, "summary without its requests"),
        ({"request_throughput": {"avg": 2.0, "unit": "requests/sec"}}, "profile_export.jsonl"),
        ({"experiments": [{"requests": [{"timestamp": 1}]}]}, "no token counts"),
        (bench(start_times=[1.0, 2.0]), "not equally long: start_times has 2"),
    ],
)
def test_results_that_are_no_trace_say_what_to_take_instead(tmp_path, document, words):
    with pytest.raises(BiscaleError, match=words):
        read_trace(written(tmp_path, json.dumps(document), "r.json"))
    with pytest.raises(BiscaleError, match=words):
        read_trace(written(tmp_path, json.dumps(document, indent=2), "r.json"))


def test_objects_that_hold_rows_or_columns(tmp_path):
    rows = [mooncake(0), mooncake(250)]
    for document in (
        {"requests": rows},
        {"meta": {"a": 1}, "data": rows},
        {key: [row[key] for row in rows] for key in rows[0]},
    ):
        path = written(tmp_path, json.dumps(document), "t.json")
        assert numbers(read_trace(path)) == ([0, 0.25], [64, 64], [8, 8])


def test_rows_with_many_lists_are_rows(tmp_path):
    more = {"hash_ids": [1, 2], "token_ids": [3], "roles": ["user"], "requests": [7]}
    for rows in ([mooncake(0, **more)], [mooncake(0, **more), mooncake(250, **more)]):
        path = written(tmp_path, lines(*rows), "t.jsonl")
        assert len(read_trace(path)) == len(rows)


def test_an_array_of_our_own_rows_keeps_their_unit(tmp_path):
    trace = Trace("t", [0.1234, 100.0, 250.5], [1, 2, 3], [4, 5, 6], "test")
    text = write_trace(trace, tmp_path / "t.jsonl").read_text()
    whole = written(tmp_path, "[" + ",".join(text.splitlines()) + "]", "t.json")
    np.testing.assert_allclose(read_trace(whole).arrival_s, trace.arrival_s, atol=1e-9)


@pytest.mark.parametrize(
    ("start", "stop", "times", "duration_s"),
    [
        ("2", "6", [0.0, 2.0], 4.0),
        ("1.5", None, [0.5, 2.5, 4.5], 4.5),
        (None, "4s", [0.0, 2.0], 4.0),
        ("2024-05-01", "2024-05-11 07:00:04", [0.0, 2.0], 4.0),
        ("2024-05-11 07:00:02", "2024-05-11T07:00:06", [0.0, 2.0], 4.0),
    ],
)
@pytest.mark.parametrize("sort", [False, True])
def test_a_part_counts_from_its_start(tmp_path, start, stop, times, duration_s, sort):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
        f"2024-05-11 07:00:0{k},{k + 1},5\n" for k in (0, 2, 4, 6)
    )
    path = written(tmp_path, text)
    loaded = load_file(path, start=start, stop=stop, sort=sort)
    assert (loaded.trace.arrival_s.tolist(), loaded.trace.duration_s) == (times, duration_s)
    assert "times count from" in loaded.recognised.sentence()
    if not sort:
        first = loaded.trace.prompt_tokens[0]
        assert (
            loaded.trace.first_line
            == text.splitlines().index(f"2024-05-11 07:00:0{first - 1},{first},5") + 1
        )


def test_a_part_of_an_unsorted_file_counts_from_its_earliest_request(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
        f"2024-05-11 07:00:0{k},{k + 1},5\n" for k in (6, 2, 8, 4)
    )
    path = written(tmp_path, text)
    late = "2024-05-11 07:00:03.5"
    for part in ({"start": "1.5", "stop": "4.5"}, {"start": late, "stop": "4.5"}):
        loaded = load_file(path, sort=True, **part)
        assert numbers(loaded.trace) == ([0.5, 2.5], [5, 7], [5, 5])
        assert loaded.recognised.offset_s == 0.0
    whole = load_file(path, sort=True)
    assert whole.recognised.origin_unix_s == 1715410802.0  # 07:00:02


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), "str")])
def test_parquet_with_dates_in_words(tmp_path, kind):
    rows = [row.split(",") for row in AZURE.splitlines()]
    columns = list(zip(*rows[1:], strict=True))
    table = {
        "TIMESTAMP": pa.array(columns[0]).cast(kind),
        "ContextTokens": [int(n) for n in columns[1]],
        "GeneratedTokens": [float(n) for n in columns[2]],
    }
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pa.table(table), path)
    assert numbers(read_trace(path)) == EXPECTED
    table["TIMESTAMP"] = pa.array(["2024-05-11 07:00:00", "soon", "later"]).cast(kind)
    pyarrow.parquet.write_table(pa.table(table), path)
    with pytest.raises(BiscaleError, match="not a readable Parquet trace"):
        read_trace(path)


def test_a_part_of_our_own_file_lasts_as_long_as_was_observed(tmp_path):
    trace = Trace("t", [1.0, 4.0, 5.0], [1, 2, 3], [4, 5, 6], "test", duration_s=20.0)
    path = write_trace(trace, tmp_path / "t.parquet")
    for start, stop, duration_s in (("2", None, 18.0), ("2", "10", 8.0), ("2", "90", 18.0)):
        part = read_trace(path, start=start, stop=stop)
        assert (part.arrival_s.tolist(), part.duration_s) == ([2.0, 3.0], duration_s)


def test_a_stream_cannot_be_sorted(tmp_path):
    path = written(tmp_path, lines(mooncake(9), mooncake(3)), "t.jsonl")
    with pytest.raises(BiscaleError, match="piece by piece, which cannot sort it"):
        next(iter_trace(path, 1.0, sort=True))


def test_line_ends_in_a_field_late_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("biscale_env.traces.rows.raw_columns.BLOCK_BYTES", 2000)
    rows = [f"{k},{k + 1},5,plain" for k in range(1000)]
    rows[700] = '700,701,5,"two\nlines"'
    text = "arrived_at,num_prefill_tokens,num_decode_tokens,note\n" + "\n".join(rows)
    assert read_trace(written(tmp_path, text)).prompt_tokens.tolist() == list(range(1, 1001))
    bad = text.replace("900,901,5,plain", "900,x,5,plain")
    with pytest.raises(BiscaleError, match="num_prefill_tokens: 'x' is not a number"):
        read_trace(written(tmp_path, bad))


def test_json_lines_with_marks_nulls_and_words(tmp_path):
    rows = [mooncake(0), mooncake(500, o=None), mooncake(900)]
    path = written(tmp_path, lines(*rows), "t.jsonl")
    with pytest.raises(BiscaleError, match="line 2: output_length is missing"):
        read_trace(path)
    assert numbers(read_trace(path, drop_failed=True)) == ([0, 0.9], [64, 64], [8, 8])
    plain = lines(mooncake(0), mooncake(500))
    for text in (b"\xef\xbb\xbf" + plain.encode(), plain.encode("utf-16")):
        assert read_trace(written(tmp_path, text, "m.jsonl")).arrival_s.tolist() == [0, 0.5]
    for word in ('"8"', "NaN", "true", "[8]"):
        bad = plain + plain.splitlines()[1].replace(": 8", f": {word}")
        with pytest.raises(BiscaleError, match=r"line 3: .*(not a JSON|not a number|missing)"):
            read_trace(written(tmp_path, bad, "w.jsonl"))


def test_twice_named_columns_matter_only_where_they_are_used(tmp_path):
    text = AZURE.replace("Tokens\n", "Tokens,note,note\n", 1)
    text = "\n".join(row if k == 0 else row + ",a,b" for k, row in enumerate(text.splitlines()))
    assert numbers(read_trace(written(tmp_path, text))) == EXPECTED


def test_parts_that_are_none(tmp_path):
    path = written(tmp_path, "arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,5\n9,5,5\n")
    for options, words in (
        ({"start": "2h"}, "has no request in the part from 7200 s to its end"),
        ({"start": "9", "stop": "3"}, "is no part of the trace"),
        ({"stop": "0"}, "is no part of the trace"),
        ({"start": "soon"}, "--from takes a time after the start such as 600"),
        ({"stop": "2024-01-01"}, "times of this trace are no dates"),
    ):
        with pytest.raises(BiscaleError, match=words):
            read_trace(path, **options)


def test_reading_stops_behind_the_part(tmp_path):
    good = "".join(f"{k},5,5\n" for k in range(1_000))
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n" + good
    path = written(tmp_path, text + "".join(f"{1000 + k},5,5\n" for k in range(200_000)) + "bad\n")
    assert len(read_trace(path, start="10", stop="20")) == 10
    with pytest.raises(BiscaleError, match="line 201002: malformed row"):
        read_trace(path, start="10")
