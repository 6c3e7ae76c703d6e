"""Tables and plain configuration of a run directory, provenance."""

import hashlib
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from evaluation_synthetic import SLO
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.evaluation.runs import provenance, run_files

NAMES = ("time_s", "power_w")


def part(folder, run, values):
    (folder / run).mkdir(parents=True)
    columns = {"time_s": np.asarray(values, float), "power_w": np.asarray(values, float)}
    pq.write_table(run_files.run_table(run, columns, NAMES), folder / run / "t.parquet")
    return folder / run / "t.parquet"


def test_plain_makes_yaml_of_anything_we_configure_with():
    data = {
        "slo": SLO,
        "seeds": np.arange(3),
        "path": Path("a/b"),
        "set": {"b", "a"},
        "x": np.float64(0.5),
        7: (1, None),
    }
    made = run_files.plain(data)
    assert yaml.safe_load(yaml.safe_dump(made)) == made
    assert made["seeds"] == [0, 1, 2]
    assert made["set"] == ["a", "b"]
    assert made["slo"]["name"] == "biscale"
    assert made["7"] == [1, None]


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab:#' ", max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.text("abc", min_size=1), PLAIN, max_size=4))
def test_plain_leaves_plain_data_as_it_is(data):
    assert run_files.plain(data) == data
    assert run_files.plain(run_files.plain(data)) == run_files.plain(data)


def test_flat_names_every_leaf():
    assert run_files.flat({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
    listed = {"points": [{"load": 0.5, "slo": {"ttft_s": 1.0}}, {"load": 0.9}], "none": []}
    assert run_files.flat(listed) == {
        "points[0].load": 0.5,
        "points[0].slo.ttft_s": 1.0,
        "points[1].load": 0.9,
        "none": [],
    }


def test_merging_replaces_a_run_and_keeps_the_others(tmp_path):
    merged = tmp_path / "t.parquet"
    run_files.merge_tables(
        merged, [part(tmp_path / "one", "aaa", [1, 2]), part(tmp_path / "one", "bbb", [3])]
    )
    run_files.merge_tables(
        merged, [part(tmp_path / "two", "bbb", [4, 5]), part(tmp_path / "two", "ccc", [])]
    )
    with pq.ParquetFile(merged) as file:
        groups = run_files.row_groups(file)
        found = {
            run: file.read_row_group(index)["power_w"].to_pylist() for run, index in groups.items()
        }
    assert found == {"aaa": [1, 2], "bbb": [4, 5]}
    before = merged.read_bytes()
    run_files.merge_tables(merged, [])
    assert merged.read_bytes() == before


def test_instants_keep_a_nanosecond_and_the_rest_seven_digits():
    instant = 3599.123456789
    table = run_files.run_table(
        "a", {"time_s": np.array([instant]), "power_w": np.array([np.pi])}, NAMES
    )
    assert table["time_s"][0].as_py() == instant
    assert table["power_w"][0].as_py() == pytest.approx(np.pi, rel=1e-7)
    assert str(table["power_w"].type) == "float"


def test_file_hash_is_sha256(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_bytes(b"knee: 1.1\n")
    assert provenance.file_hash(path) == hashlib.sha256(b"knee: 1.1\n").hexdigest()


def test_revision_of_a_checkout_and_its_edits(tmp_path):
    assert provenance.git_revision(tmp_path) is None

    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@t")
        subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True
        )

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    clean = provenance.git_revision(tmp_path)
    assert len(clean) == 40
    (tmp_path / "a").write_text("2")
    assert provenance.git_revision(tmp_path) == clean + "+changes"


def test_revision_is_unknown_without_git(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_revision(tmp_path) is None
