"""Reading and writing what prompts share: Mooncake, Qwen-Bailian, AIPerf, and files of our own."""

import gzip
import json

import numpy as np
import pytest
from block_helpers import slow_hits

from biscale_env.core.errors import BiscaleError, BiscaleWarning
from biscale_env.traces import iter_trace, load_file, read_trace, read_windows, write_trace

MOONCAKE = [
    {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [10, 11]},
    {"timestamp": 2000, "input_length": 500, "output_length": 5, "hash_ids": [77]},
    {"timestamp": 3000, "input_length": 1600, "output_length": 5, "hash_ids": [10, 11, 12, 13]},
    {"timestamp": 9000, "input_length": 1600, "output_length": 5, "hash_ids": [10, 11, 12, 13]},
]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def hits(trace):
    return slow_hits(trace, np.inf)


def test_mooncake(tmp_path):
    loaded = load_file(lines(tmp_path / "m.jsonl", MOONCAKE))
    assert loaded.trace.blocks.block_tokens == 512
    assert hits(loaded.trace) == [0, 0, 1024, 1599]
    assert loaded.trace.blocks.session.tolist() == [0, 1, 0, 0]
    assert "prompts in blocks of 512 tokens" in loaded.recognised.sentence()


@pytest.mark.parametrize("form", ["array", "gzip", "utf-8 mark", "texts", "large", "mixed"])
def test_hashes_are_read_however_the_file_is_written(tmp_path, form):
    rows = [dict(row) for row in MOONCAKE]
    path = tmp_path / "m.jsonl"
    if form in ("texts", "large", "mixed"):
        new = {"texts": lambda h: f"x{h}", "large": lambda h: 2**64 - h, "mixed": str}[form]
        for row in rows[1 if form == "mixed" else 0 :]:
            row["hash_ids"] = [new(h) for h in row["hash_ids"]]
        if form == "mixed":  # the same block in two spellings is two blocks
            rows.append({**rows[-1], "timestamp": 9500})
    lines(path, rows)
    if form == "array":
        path.write_text(json.dumps(rows))
    elif form == "gzip":
        packed = gzip.compress(path.read_bytes())
        (path := tmp_path / "m.jsonl.gz").write_bytes(packed)
    elif form == "utf-8 mark":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    expected = [0, 0, 0, 1599, 1599] if form == "mixed" else [0, 0, 1024, 1599]
    assert hits(read_trace(path)) == expected


def test_qwen_bailian_tells_its_sessions(tmp_path):
    turns = [(1, -1, 40), (2, -1, 20), (3, 1, 64), (4, 3, 90), (5, 77, 30)]
    rows = [
        {"chat_id": chat, "parent_chat_id": parent, "timestamp": k, "input_length": length,
         "output_length": 3, "type": "text", "turn": 1, "hash_ids": list(range(-(-length // 16)))}
        for k, (chat, parent, length) in enumerate(turns)
    ]  # fmt: skip
    loaded = load_file(lines(tmp_path / "q.jsonl", rows), time_unit="s")
    assert loaded.trace.blocks.block_tokens == 16
    assert loaded.trace.blocks.session.tolist() == [0, 1, 0, 0, 2]
    assert hits(loaded.trace) == [0, 19, 48, 64, 29]
    assert loaded.recognised.has_sessions


@pytest.mark.parametrize("size", [64, 256])
def test_the_size_of_a_block_follows_from_the_lengths_where_nobody_says_it(tmp_path, size):
    rng = np.random.default_rng(0)
    rows = [
        {"arrival_time": float(k), "prompt_tokens": int(n), "output_tokens": 2,
         "hash_ids": [int(x) for x in rng.integers(0, 9, -(-int(n) // size))]}
        for k, n in enumerate(rng.integers(1, 3000, 50))
    ]  # fmt: skip
    path = lines(tmp_path / "own.jsonl", rows)
    assert read_trace(path, time_unit="s").blocks.block_tokens == size
    rows[3]["hash_ids"] = [1] * 40
    rows[4]["hash_ids"] = [1]
    with pytest.warns(BiscaleWarning, match="agree with no block size"):
        assert read_trace(lines(path, rows), time_unit="s").blocks is None


def test_more_hashes_than_blocks_are_said_and_left_out(tmp_path):
    rows = [*MOONCAKE[:1], {**MOONCAKE[1], "hash_ids": [1, 2]}, *MOONCAKE[2:]]
    with pytest.warns(BiscaleWarning, match="line 2: 2 hash_ids are more than a prompt of 500"):
        trace = read_trace(lines(tmp_path / "m.jsonl", rows))
    assert trace.blocks.counts.tolist() == [2, 1, 4, 4]


def test_hashes_that_are_none_are_named_with_their_line(tmp_path):
    rows = [*MOONCAKE[:2], {**MOONCAKE[2], "hash_ids": "10,11"}]
    with pytest.raises(BiscaleError, match="line 3: hash_ids must be a list"):
        read_trace(lines(tmp_path / "m.jsonl", rows))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_written_and_read_again(tmp_path, suffix):
    trace = read_trace(lines(tmp_path / "m.jsonl", MOONCAKE))
    again = read_trace(write_trace(trace, tmp_path / f"again{suffix}"))
    assert again.sha256 == trace.sha256
    plain = read_trace(write_trace(trace, tmp_path / "again.csv"))
    assert plain.blocks is None


def test_pieces_of_a_file_have_the_numbers_of_the_whole(tmp_path):
    path = lines(tmp_path / "m.jsonl", MOONCAKE)
    whole = read_trace(path)
    pieces = list(iter_trace(path, 2.5))
    ids = np.concatenate([p.blocks.ids for p in pieces if len(p)])
    assert ids.tolist() == whole.blocks.ids.tolist()
    windows = list(read_windows(path, 2.9))
    assert [len(w.trace) for w in windows] == [2, 1, 0]
    assert windows[1].trace.blocks.ids.tolist() == whole.blocks.take([2]).ids.tolist()
    part = read_trace(path, start="2.5")
    assert part.blocks.take([0]).content() == whole.blocks.take([2]).content()
    mixed_up = lines(tmp_path / "u.jsonl", MOONCAKE[::-1])
    assert read_trace(mixed_up, sort=True).blocks.content() == whole.blocks.content()


def test_failed_requests_leave_no_blocks(tmp_path):
    rows = [MOONCAKE[0], {**MOONCAKE[2], "output_length": 0}, MOONCAKE[3]]
    trace = read_trace(lines(tmp_path / "m.jsonl", rows), drop_failed=True)
    assert hits(trace) == [0, 1024]


def record(chat, start_ms, prompt, output):
    return {
        "metadata": {
            "x_correlation_id": chat, "request_start_ns": 10**18 + start_ms * 10**6,
            "benchmark_phase": "profiling",
        },
        "metrics": {
            "input_sequence_length": {"value": prompt, "unit": "tokens"},
            "output_sequence_length": {"value": output, "unit": "tokens"},
        },
    }  # fmt: skip


def test_chats_in_results_of_aiperf(tmp_path):
    """A turn goes on with the prompt before it where it can hold that and the answer."""
    rows = [
        record("a", 0, 100, 20), record("b", 5, 90, 4), record("a", 40, 150, 9),
        record("b", 60, 93, 4), record("a", 90, 159, 4),
    ]  # fmt: skip
    trace = read_trace(lines(tmp_path / "profile_export.jsonl", rows))
    assert trace.blocks.session.tolist() == [0, 1, 0, 1, 0]
    # in blocks of 16: 100 tokens are 6 whole ones, 150 are 9; 93 do not hold 90 and an answer of 4
    assert hits(trace) == [0, 0, 96, 0, 144]
    assert read_trace(lines(tmp_path / "single.jsonl", [rows[0], rows[1]])).blocks is None


SESSIONS = [
    {"session_id": "s1", "timestamp": 0, "input_length": 100, "output_length": 20},
    {"session_id": "s2", "timestamp": 500, "input_length": 50, "output_length": 10},
    {"session_id": "s1", "delay": 2000, "input_length": 30, "output_length": 7},
    {"session_id": "s2", "delay": 100, "input_length": 40, "output_length": 3},
]


def test_session_files_of_aiperf(tmp_path):
    """What the user adds, after a delay: the prompt is the chat so far."""
    loaded = load_file(lines(tmp_path / "sessions.jsonl", SESSIONS))
    trace = loaded.trace
    assert trace.arrival_s.tolist() == [0.0, 0.5, 0.6, 2.0]
    assert trace.prompt_tokens.tolist() == [100, 50, 100, 150]
    assert trace.output_tokens.tolist() == [20, 10, 3, 7]
    assert trace.blocks.session.tolist() == [0, 1, 1, 0]
    assert hits(trace) == [0, 0, 48, 96]
    assert "AIPerf sessions" in loaded.recognised.sentence()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"session_id": "s3", "delay": 5, "input_length": 5, "output_length": 2},
            "needs a timesta",
        ),
        (
            {"session_id": "s1", "delay": "x", "input_length": 5, "output_length": 2},
            "delay is miss",
        ),
        (
            {"session_id": "s1", "delay": 5, "input_length": None, "output_length": 2},
            "input_length",
        ),
    ],
)
def test_a_faulty_turn_is_named_with_its_line(tmp_path, row, words):
    with pytest.raises(BiscaleError, match=f"line 5: .*{words}"):
        load_file(lines(tmp_path / "sessions.jsonl", [*SESSIONS, row]))
