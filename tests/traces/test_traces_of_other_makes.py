"""Files as still other programs write them: encodings, frames of pandas, nested rows, hashes.

What is told late or in an odd form is told too, and what cannot be used is said.
"""

import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from trace_files import lines, written

from biscale_env.core.errors import BiscaleError, BiscaleWarning
from biscale_env.traces import load_file, read_trace

ROWS = "arrival_s,prompt_tokens,output_tokens,{}\n0,50,6,{}\n1.5,40,4,{}\n2,30,7,{}\n"
EXPECTED = ([0.0, 1.5, 2.0], [50, 40, 30], [6, 4, 7])


def numbers(trace):
    return trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist()


def row(t, i=600, o=8, **more):
    return {"timestamp": t, "input_length": i, "output_length": o, **more}


PLAIN = ROWS.format("model", "a", "b", "c")


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_encodings_with_and_without_a_mark(tmp_path, code, pack):
    assert numbers(read_trace(written(tmp_path, pack(PLAIN.encode(code)), "t"))) == EXPECTED
    text = lines(row(0), row(500)).encode(code)
    assert read_trace(written(tmp_path, pack(text), "j")).arrival_s.tolist() == [0.0, 0.5]


def test_bytes_that_are_no_text_matter_only_where_they_are_read(tmp_path):
    text = ROWS.format("model", "café", "b", "naïve").encode("latin-1")
    assert numbers(read_trace(written(tmp_path, text))) == EXPECTED
    with pytest.raises(BiscaleError, match="not UTF-8 text"):
        read_trace(written(tmp_path, ROWS.format("modèle", 1, 2, 3).encode("latin-1")))


def test_an_end_of_file_of_old_and_decimal_commas_that_come_late(tmp_path):
    assert numbers(read_trace(written(tmp_path, PLAIN + "\x1a"))) == EXPECTED
    commas = PLAIN.replace(",", ";").replace("1.5", "1,5")
    assert numbers(read_trace(written(tmp_path, commas))) == EXPECTED


def test_archives_of_many_files_and_tables_of_other_programs_are_named(tmp_path):
    box = io.BytesIO()
    with tarfile.open(fileobj=box, mode="w:gz") as tar:
        told = tarfile.TarInfo("t.csv")
        told.size = len(PLAIN)
        tar.addfile(told, io.BytesIO(PLAIN.encode()))
    with pytest.raises(BiscaleError, match="is a tar archive: unpack it"):
        read_trace(written(tmp_path, box.getvalue(), "t.tar.gz"))
    table = pa.table({"arrival_s": [0.0], "prompt_tokens": [5], "output_tokens": [5]})
    with pa.ipc.new_file(str(tmp_path / "t.arrow"), table.schema) as file:
        file.write_table(table)
    with pytest.raises(BiscaleError, match=r"an Arrow \(Feather\) file"):
        read_trace(tmp_path / "t.arrow")


COLUMNS = {"timestamp": [0, 500], "input_length": [50, 60], "output_length": [5, 6]}
DOCUMENTS = {
    "each row under a number": {"0": row(0, 50, 5), "1": row(500, 60, 6)},
    "each row under a name": {"a-1": row(0, 50, 5), "b-9": row(500, 60, 6)},
    "columns of numbered values": {k: {"0": v[0], "1": v[1]} for k, v in COLUMNS.items()},
    "columns and data": {
        "columns": list(COLUMNS),
        "index": [0, 1],
        "data": [list(r) for r in zip(*COLUMNS.values(), strict=True)],
    },
    "a table with its schema": {"schema": {"fields": []}, "data": [row(0, 50, 5), row(500, 60, 6)]},
}


@pytest.mark.parametrize("how", DOCUMENTS)
def test_frames_and_tables_of_rows_in_one_object(tmp_path, how):
    for indent in (None, 1):
        path = written(tmp_path, json.dumps(DOCUMENTS[how], indent=indent), "t.json")
        assert numbers(read_trace(path)) == ([0.0, 0.5], [50, 60], [5, 6])


def test_rows_that_hold_objects(tmp_path):
    servegen = [
        {"request_id": k, "timestamp": t, "data": {"input_tokens": 30 + k, "output_tokens": 4}}
        for k, t in enumerate((0.5, 2.0))
    ]
    logged = [
        {"created": 1_715_410_800 + k, "usage": {"prompt_tokens": 30 + k, "completion_tokens": 4}}
        for k in (0, 2)
    ]
    for rows, times, title in ((servegen, [0, 1.5], "ServeGen"), (logged, [0, 2.0], "columns cre")):
        for text in (lines(*rows), json.dumps(rows), json.dumps({"requests": rows})):
            loaded = load_file(written(tmp_path, text, "t.json"))
            assert loaded.trace.arrival_s.tolist() == times
            assert loaded.trace.output_tokens.tolist() == [4, 4]
            assert loaded.recognised.format.startswith(title)
    named = read_trace(
        written(tmp_path, lines(*logged), "t.jsonl"), prompt_column="usage.completion_tokens",
        output_column="usage.prompt_tokens",
    )  # fmt: skip
    assert named.prompt_tokens.tolist() == [4, 4]


RESULT = {
    "request_throughput": 1.5,
    "start_times": [8.0, 8.5, 11.0],
    "input_lens": [30, 40, 50],
    "output_lens": [5, 6, 7],
    "errors": ["", "", "Timeout"],
}


@pytest.mark.parametrize("pack", [lambda r: [r], lambda r: {"results": r}, lambda r: {"run-1": r}])
def test_a_result_of_a_benchmark_inside_something(tmp_path, pack):
    path = written(tmp_path, json.dumps(pack(RESULT)), "r.json")
    assert numbers(read_trace(path)) == ([0.0, 0.5, 3.0], [30, 40, 50], [5, 6, 7])
    assert len(read_trace(path, drop_failed=True)) == 2
    two = written(tmp_path, json.dumps([RESULT, RESULT]), "r.json")
    with pytest.raises(BiscaleError, match="holds several results: keep one of them"):
        read_trace(two)


@pytest.mark.parametrize("name", ["Timestamp [ms]", "arrival (ms)", "start time / ms"])
def test_units_in_brackets_behind_the_name_of_a_column(tmp_path, name):
    text = f"{name},prompt_tokens,output_tokens\n0,5,6\n100,5,6\n"
    named = {} if name != "start time / ms" else {"time_column": name}
    loaded = load_file(written(tmp_path, text), **named)
    assert loaded.trace.arrival_s.tolist() == [0.0, 0.1]
    assert loaded.recognised.unit_because == "as its column says"


def test_a_line_that_is_no_object_is_named(tmp_path):
    text = ",\n".join(json.dumps(row(t)) for t in (0, 500)) + ",\n"
    with pytest.raises(BiscaleError, match="line 1: malformed row: not a JSON object"):
        read_trace(written(tmp_path, text, "t.jsonl"))
    with pytest.raises(BiscaleError, match="holds no request"):
        read_trace(written(tmp_path, "[]", "t.json"))


@pytest.mark.parametrize(
    ("late", "words"),
    [("2024-05-11 09:00:02", "has no zone offset"), ("2024-05-11 09:00:02+02:00", "")],
)
def test_dates_with_zones_and_one_without(tmp_path, late, words):
    table = f"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-11T07:00:00Z,5,6\n{late},5,6\n"
    rows = lines(row("2024-05-11T07:00:00Z"), row(late))
    for text, name, where in ((table, "t.csv", "line 3"), (rows, "t.jsonl", "line 2")):
        path = written(tmp_path, text, name)
        if words:
            with pytest.raises(BiscaleError, match=f"{where}: .*{words}, unlike others"):
                read_trace(path)
        else:
            assert read_trace(path).arrival_s.tolist() == [0.0, 2.0]


FAILED = {
    "status": (200, 503, 200),
    "http_status": (200, 400, 399),
    "succeeded": (True, False, None),
    "status_code": ("200", "429", "200"),
    "Status": ("ok", "timeout", "completed"),
    "success": (True, False, True),
    "error": ("", "Service Unavailable", ""),
    "was_cancelled": (False, True, False),
}


@pytest.mark.parametrize("name", FAILED)
@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "parquet"])
def test_requests_that_a_column_says_failed(tmp_path, name, form):
    told = FAILED[name]
    rows = [
        dict(arrival_s=t, prompt_tokens=p, output_tokens=o) | {name: what}
        for t, p, o, what in zip(*EXPECTED, told, strict=True)
    ]
    path = tmp_path / f"t.{form}"
    if form == "csv":
        path.write_text(ROWS.format(name, *told))
    elif form == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(lines(*rows) if form == "jsonl" else json.dumps(rows))
    kept = load_file(path)
    assert numbers(kept.trace) == EXPECTED
    assert "1 failed requests kept (--drop-failed)" in kept.recognised.sentence()
    left = load_file(path, drop_failed=True)
    assert numbers(left.trace) == ([0.0, 2.0], [50, 30], [6, 7])
    assert left.recognised.rows_dropped == 1


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "parquet"])
def test_one_column_of_several_is_enough_and_nothing_is_no_failure(tmp_path, form):
    rows = [
        dict(arrival_s=t, prompt_tokens=p, output_tokens=o, status=status, error=error)
        for t, p, o, status, error in zip(
            *EXPECTED, (200, 503, 200), ("Timeout", None, None), strict=True
        )
    ]
    path = tmp_path / f"t.{form}"
    if form == "csv":
        path.write_text(ROWS.format("status,error", "200,Timeout", "503,", "200,"))
    elif form == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(lines(*rows) if form == "jsonl" else json.dumps(rows))
    assert numbers(load_file(path, drop_failed=True).trace) == ([2.0], [30], [7])


def test_a_name_that_stands_twice_says_nothing_of_failures(tmp_path):
    path = written(tmp_path, ROWS.format("error,error", ",x", ",x", ",x"))
    assert numbers(load_file(path, drop_failed=True).trace) == EXPECTED


def test_errors_as_objects_and_outputs_of_minus_one(tmp_path):
    rows = [row(0, error=None), row(500, error={"code": 503}), row(900, -1 + 31, -1), row(950)]
    path = written(tmp_path, lines(*rows), "t.jsonl")
    with pytest.raises(BiscaleError, match=r"line 3: output_length is -1; .*--drop-failed"):
        read_trace(path)
    assert read_trace(path, drop_failed=True).arrival_s.tolist() == [0.0, 0.95]


HASHED = [(0, [1, 2]), (500, [1, 2]), (900, [1, 3])]
FORMS = {
    "numbers": lambda ids: ids,
    "numbers with a point": lambda ids: [float(k) for k in ids],
    "texts": lambda ids: [f"h{k}" for k in ids],
    "a list as text": str,
    "a list of texts as text": lambda ids: str([f"h{k}" for k in ids]),
    "beyond 63 bits": lambda ids: [2**64 - k for k in ids],
}


def blocks_of(trace):
    assert trace.blocks is not None
    return trace.blocks.ids.tolist(), trace.blocks.starts.tolist(), trace.blocks.block_tokens


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "csv"])
def test_hashes_in_any_form(tmp_path, how, form):
    rows = [row(t, hash_ids=FORMS[how](ids)) for t, ids in HASHED]
    path = tmp_path / f"t.{form}"
    if form == "parquet":
        columns = {name: [r[name] for r in rows] for name in rows[0]}
        if how == "beyond 63 bits":
            columns["hash_ids"] = pa.array(columns["hash_ids"], pa.list_(pa.uint64()))
        pyarrow.parquet.write_table(pa.table(columns), path)
    elif form == "csv":
        keys = ",".join(rows[0])
        cells = [[f'"{value}"' for value in r.values()] for r in rows]
        path.write_text("\n".join([keys, *(",".join(c) for c in cells)]))
    else:
        path.write_text(lines(*rows) if form == "jsonl" else json.dumps(rows))
    ids, starts, size = blocks_of(read_trace(path))
    assert (starts, size) == ([0, 2, 4, 6], 512)
    assert ids[0] == ids[2] == ids[4]
    assert ids[1] == ids[3] != ids[5]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_hashes_stay_with_their_rows_where_others_are_dropped(tmp_path, form):
    told = [([1, 2, 3], "gone"), ([4], ""), ([5, 6], "gone"), ([4, 7, 8], "")]
    rows = [
        row(500 * k, 512 * len(ids), hash_ids=ids, error=error)
        for k, (ids, error) in enumerate(told)
    ]
    path = tmp_path / f"t.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(lines(*rows) if form == "jsonl" else json.dumps(rows))
    ids, starts, _ = blocks_of(read_trace(path, drop_failed=True))
    assert starts == [0, 1, 4]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("form", ["jsonl", "json"])
@pytest.mark.parametrize("first", [{}, {"hash_ids": None}, {"hash_ids": []}])
@pytest.mark.parametrize("make", [int, str])
def test_hashes_that_are_missing_in_the_first_rows(tmp_path, form, first, make):
    rows = [row(0, **first)] + [
        row(t + 9, hash_ids=[make(k) for k in ids], Slo_Class="batch") for t, ids in HASHED
    ]
    text = lines(*rows) if form == "jsonl" else json.dumps(rows)
    trace = read_trace(written(tmp_path, text, f"t.{form}"))
    assert trace.blocks.counts.tolist() == [0, 2, 2, 2]
    assert trace.classes.each().tolist() == ["none", "batch", "batch", "batch"]


def test_lists_that_are_all_empty_are_no_hashes(tmp_path):
    rows = lines(row(0, hash_ids=[]), row(500, hash_ids=[]))
    assert read_trace(written(tmp_path, rows, "t.jsonl")).blocks is None


@pytest.mark.parametrize("bad", [[1, None], [None, 1], [[1], [2]], [True], [1.5], 7, {"a": 1}, "x"])
@pytest.mark.parametrize("at", [0, 1])
def test_hashes_that_are_none_are_refused_wherever_they_stand(tmp_path, bad, at):
    rows = [row(t, hash_ids=ids) for t, ids in HASHED]
    rows[at]["hash_ids"] = bad
    with pytest.raises(BiscaleError, match=f"line {at + 1}: hash_ids must be a list of whole"):
        read_trace(written(tmp_path, lines(*rows), "t.jsonl"))


def test_missing_hashes_inside_a_list_of_parquet(tmp_path):
    table = pa.table(COLUMNS | {"hash_ids": pa.array([[1], [2, None]])})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(BiscaleError, match="row 2: hash_ids must be"):
        read_trace(tmp_path / "t.parquet")


@pytest.mark.parametrize("size", [16, 64, 128, 1024])
@pytest.mark.parametrize("is_floor", [False, True])
def test_blocks_of_another_size_than_documented(tmp_path, size, is_floor):
    """Tools that write Mooncake's keys choose the size: the lengths say it, or a key does."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1500, 9000, 30).tolist()
    counts = [n // size if is_floor else -(-n // size) for n in lengths]
    rows = [
        row(90 * k, n, hash_ids=list(range(c)))
        for k, (n, c) in enumerate(zip(lengths, counts, strict=True))
    ]
    loaded = load_file(written(tmp_path, lines(*rows), "t.jsonl"))
    assert loaded.trace.blocks.block_tokens == size
    assert f"blocks of {size} tokens" in loaded.recognised.sentence()
    assert loaded.trace.blocks.counts.tolist() == counts


def test_a_size_that_is_told_goes_first(tmp_path):
    rows = [row(0, 600, hash_ids=[1, 2], block_size=256), row(900, 700, hash_ids=[1, 2])]
    path = written(tmp_path, lines(*rows), "t.jsonl")
    assert read_trace(path).blocks.block_tokens == 256
    assert read_trace(path, block_tokens=512).blocks.block_tokens == 512
    with pytest.raises(BiscaleError, match="block_tokens"):
        read_trace(path, block_tokens=0)
    generic = written(
        tmp_path,
        lines({"arrival_s": 0, "prompt_tokens": 600, "output_tokens": 5, "hash_ids": [1, 2]}),
        "g.jsonl",
    )
    with pytest.warns(BiscaleWarning, match=r"blocks of 256 or 512 tokens: .*--block-tokens"):
        assert read_trace(generic).blocks is None
    assert read_trace(generic, block_tokens=256).blocks.block_tokens == 256


@pytest.mark.parametrize("word", ["NaN", "null", "None", "", "n/a"])
def test_words_for_no_class(tmp_path, word):
    trace = read_trace(written(tmp_path, ROWS.format("slo_class", "batch", word, "chat")))
    assert trace.classes.each().tolist() == ["batch", "none", "chat"]
