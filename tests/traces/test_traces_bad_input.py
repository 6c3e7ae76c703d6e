"""Bad input: one sentence that names the file, the line and the field."""

import gzip

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.traces import iter_trace, load_named, read_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
GOOD = [
    "2023-11-16 18:17:03.9799600,4808,10",
    "2023-11-16 18:17:04.0319600,3180,8",
    "2023-11-16 18:17:05.0,110,27",
]


def azure(row, at=1):
    rows = list(GOOD)
    rows[at] = row
    return "\n".join([HEADER, *rows])


CSV_CASES = {
    "too few fields": (
        azure("2023-11-16 18:17:04.03,3180"),
        "line 3: malformed row: Expected 3 columns, got 2",
    ),
    "too many fields": (
        azure("2023-11-16 18:17:04.03,3180,8,9"),
        "line 3: malformed row: Expected 3 columns, got 4",
    ),
    "words for a number": (
        azure("2023-11-16 18:17:04.03,abc,8"),
        "line 3: ContextTokens: 'abc' is not a number",
    ),
    "words for a date": (
        azure("yesterday,3180,8"),
        "line 3: TIMESTAMP: 'yesterday' is not a number or date",
    ),
    "impossible date": (
        azure("2023-13-16 18:17:04.03,3180,8"),
        "line 3: TIMESTAMP: '2023-13-16 18:17:04.03' is not",
    ),
    "zone in one row": (
        azure("2023-11-16 18:17:04.03+00:00,3180,8"),
        "line 3: TIMESTAMP: .*zone offset",
    ),
    "empty time": (azure(",3180,8"), "line 3: TIMESTAMP is missing"),
    "empty first time": (azure(",3180,8", at=0), "line 2: TIMESTAMP is missing"),
    "empty length": (azure("2023-11-16 18:17:04.03,,8"), "line 3: ContextTokens is missing"),
    "NaN length": (
        azure("2023-11-16 18:17:04.03,nan,8"),
        "line 3: ContextTokens is missing or not a finite number",
    ),
    "infinite length": (
        azure("2023-11-16 18:17:04.03,inf,8"),
        "line 3: ContextTokens is missing or not a finite",
    ),
    "negative length": (
        azure("2023-11-16 18:17:04.03,-5,8"),
        "line 3: ContextTokens is -5; a length must be",
    ),
    "negative output": (
        azure("2023-11-16 18:17:04.03,5,-8"),
        "line 3: GeneratedTokens is -8; a length must be",
    ),
    "zero prompt": (
        azure("2023-11-16 18:17:04.03,0,8"),
        "line 3: ContextTokens is 0; a length must be .* from 1",
    ),
    "half a token": (azure("2023-11-16 18:17:04.03,1.5,8"), "line 3: ContextTokens is 1.5"),
    "absurd length": (azure("2023-11-16 18:17:04.03,3000000000,8"), "line 3: ContextTokens is 3e"),
    "unsorted": (
        azure("2023-11-16 18:17:02.9799600,3180,8"),
        "line 3: TIMESTAMP lies 1 s before the row above",
    ),
    "unsorted last": (
        azure("2023-11-16 18:17:04.0,1,8", at=2),
        "line 4: TIMESTAMP lies 0.03196 s before",
    ),
    "blank line inside": (azure(""), "line 3: TIMESTAMP is missing"),
    "wrong header": (
        "time,in,out\n1,2,3\n",
        "line 1: wrong header 'time,in,out'; expected TIMESTAMP,",
    ),
    "no header": ("\n".join(GOOD), "line 1: wrong header"),
    "header alone": (HEADER + "\n", "holds a header but no request"),
    "column twice": (
        HEADER + ",TIMESTAMP\n",
        "line 1: time, prompt and output must be three different columns",
    ),
    "empty": ("", "is empty"),
    "blank": ("\n \n", "is empty"),
    "negative time": (
        "arrival_s,prompt_tokens,output_tokens\n0,1,1\n-2,1,1\n",
        "line 3: arrival_s is -2 s",
    ),
    "NaN time": (
        "arrival_s,prompt_tokens,output_tokens\n0,1,1\nnan,1,1\n",
        "line 3: arrival_s is missing",
    ),
    "infinite time": (
        "arrival_s,prompt_tokens,output_tokens\n0,1,1\ninf,1,1\n",
        "line 3: arrival_s is missing or not",
    ),
}

MOON = '{"timestamp": 0, "input_length": 5, "output_length": 2, "hash_ids": [1]}\n'
JSON_CASES = {
    "not json": (MOON + "nonsense\n", "line 2: malformed row: not a JSON object"),
    "cut off": (MOON + '{"timestamp": 5, "input_le', "line 2: malformed row: not a JSON object"),
    "a list of numbers": ("[1, 2]\n", "item 1: malformed row: not a JSON object"),
    "a list cut off": ("[" + MOON.strip() + ",\n", "item 2: malformed row: not a JSON object"),
    "key missing": (
        MOON + '{"timestamp": 5, "input_length": 5}\n',
        "line 2: output_length is missing",
    ),
    "key missing first": (
        '{"timestamp": 5, "input_length": 5}\n',
        "line 1: wrong header 'timestamp,input_length'",
    ),
    "text": (MOON + MOON.replace("5", '"x"'), "line 2: input_length is missing or not a number"),
    "text time": (
        MOON + MOON.replace(": 0", ': "x"'),
        "line 2: timestamp is missing or not a number",
    ),
    "null": (MOON + MOON.replace("5", "null"), "line 2: input_length is missing"),
    "negative": (MOON + "\n\n" + MOON.replace("5", "-5"), "line 4: input_length is -5"),
    "negative time": (MOON + MOON.replace(": 0", ": -7"), "line 2: timestamp is -0.007 s"),
    "unsorted": (MOON.replace(": 0", ": 9") + MOON, "line 2: timestamp lies 0.009 s before"),
    "blank": ("\n\n", "is empty"),
}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (f"bad.{kind}", *case)
        for kind, cases in (("csv", CSV_CASES), ("jsonl", JSON_CASES))
        for case in cases.values()
    ],
    ids=[*CSV_CASES, *(f"json {key}" for key in JSON_CASES)],
)
def test_one_sentence_names_file_line_and_field(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BiscaleError, match=words) as caught:
        read_trace(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400
    with pytest.raises(BiscaleError, match=words):
        list(iter_trace(path, 10.0))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"timestamp": [0.0, -1.0], "input_length": [1, 1], "output_length": [1, 1]},
            "row 2: timestamp is -0.001 s",
        ),
        (
            {"timestamp": [0.0, 1.0], "input_length": [1, None], "output_length": [1, 1]},
            "row 2: input_length is missing",
        ),
        (
            {"timestamp": [0.0, 1.0], "input_length": [1, "x"], "output_length": [1, 1]},
            "not a readable Parquet trace",
        ),
        (
            {"timestamp": [0.0, 1.0], "input": [1, 1], "output_length": [1, 1]},
            "wrong header 'timestamp,input,",
        ),
    ],
)
def test_parquet(tmp_path, columns, words):
    frame = pd.DataFrame(columns)
    if "input_length" in columns and "x" in columns["input_length"]:
        frame["input_length"] = frame["input_length"].astype(str)
    frame.to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(BiscaleError, match=words):
        read_trace(tmp_path / "bad.parquet")


def test_files_that_are_none(tmp_path):
    with pytest.raises(BiscaleError, match="there is no trace file"):
        read_trace(tmp_path / "missing.csv")
    with pytest.raises(BiscaleError, match="there is no trace file"):
        read_trace(tmp_path)
    (tmp_path / "noise.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(BiscaleError, match="not a readable Parquet trace"):
        read_trace(tmp_path / "noise.parquet")
    (tmp_path / "latin.csv").write_bytes(b"caf\xe9," * 20)
    with pytest.raises(BiscaleError, match="not UTF-8 text"):
        read_trace(tmp_path / "latin.csv")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(azure(GOOD[1]).encode())[:-12])
    with pytest.raises(BiscaleError, match=r"cut.csv.gz( is a damaged archive|: Truncated)"):
        read_trace(tmp_path / "cut.csv.gz")
    (tmp_path / "fake.csv.gz").write_bytes(b"not compressed at all")
    with pytest.raises(BiscaleError, match=r"cannot read .*fake"):
        read_trace(tmp_path / "fake.csv.gz")


def test_options(tmp_path):
    path = tmp_path / "ok.csv"
    path.write_text(azure(GOOD[1]))
    with pytest.raises(BiscaleError, match="there is no column 'when'; the columns are TIMESTAMP"):
        read_trace(path, time_column="when")
    with pytest.raises(BiscaleError, match="unknown time unit 'h'; known: s, ms, us, ns"):
        read_trace(path, time_unit="h")
    with pytest.raises(BiscaleError, match="three different columns"):
        read_trace(path, prompt_column="GeneratedTokens")


def test_names_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path))
    with pytest.raises(
        BiscaleError,
        match=r"there is no trace 'azure-conv'; known: .*azure-conv-like.*azure-conv-2023",
    ):
        load_named("azure-conv")
    with pytest.raises(BiscaleError, match="run 'biscale traces fetch azure-conv-2023' first"):
        load_named("azure-conv-2023")
    with pytest.raises(BiscaleError, match=r"there is no trace file nowhere.csv"):
        load_named("nowhere.csv")


PIECES = [
    '"', ",", ";", "\n", "\r", "{", "}", "[", "]", ":", "null", "true", "NaN", "-1", "1e400",
    "9" * 400, "\0", "é", "\ufeff", "  ", "\t", "'", "1.5", '"x"', "{}", "2024-01-01", "\\",
]  # fmt: skip
WHOLE = [
    azure(GOOD[1]),
    azure(GOOD[1]).replace(",", ";"),
    MOON + MOON.replace(": 0", ": 500"),
    "[" + MOON.strip() + "," + MOON.strip() + "]",
    '{"input_lens": [1, 2], "output_lens": [3, 4], "start_times": [1.0, 2.0], "errors": ["", ""]}',
    '{"metadata": {"request_start_ns": 1760000000000000000}, "error": null, "metrics": '
    '{"input_sequence_length": {"value": 5}, "output_sequence_length": {"value": 6}}}\n',
]


@st.composite
def damaged(draw):
    """A good file with a few pieces put in, taken out or exchanged."""
    text = draw(st.sampled_from(WHOLE))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        gone = draw(st.integers(0, 8))
        text = text[:at] + draw(st.sampled_from(["", *PIECES])) + text[at + gone :]
    return text.encode()


@given(damaged(), st.sampled_from(["t.csv", "t.json", "t.jsonl", "t"]), st.booleans())
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore::biscale_env.core.errors.BiscaleWarning")
def test_any_damage_is_read_or_one_sentence(tmp_path_factory, content, name, lenient):
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(content)
    said = ""
    try:
        assert len(read_trace(path, sort=lenient, drop_failed=lenient)) > 0
    except BiscaleError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 700


def test_numbers_beyond_any_float(tmp_path):
    path = tmp_path / "t.json"
    for bad, words in (
        (WHOLE[3].replace(": 5", ": 1" + "0" * 400, 1), "item 1: input_length is missing or not"),
        (WHOLE[5].replace("17600", "17600" + "0" * 9), "request_start_ns is missing or not"),
    ):
        path.write_text(bad)
        with pytest.raises(BiscaleError, match=words):
            read_trace(path)
