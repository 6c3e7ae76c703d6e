"""Markdown tables as GitHub reads them."""

import re

from hypothesis import given
from hypothesis import strategies as st

from biscale_env.core.markdown import markdown_table


def test_words_to_the_left_and_numbers_to_the_right():
    assert markdown_table(("who", "J"), [("max", 1.5), ("a|b", 2)]).splitlines() == [
        "| who | J |",
        "|---|---:|",
        "| max | 1.5 |",
        "| a\\|b | 2 |",
    ]


def test_the_last_side_counts_for_the_rest():
    assert markdown_table("abcd", [], "llr").splitlines()[1] == "|---|---|---:|---:|"
    assert markdown_table("abc", [], "l").splitlines()[1] == "|---|---|---|"
    assert markdown_table("ab", [], "rlr").splitlines()[1] == "|---:|---|"


@given(st.lists(st.lists(st.text("ab| \\", max_size=4), min_size=3, max_size=3), max_size=4))
def test_every_row_has_a_cell_per_column(rows):
    lines = markdown_table("abc", rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert all(len(re.findall(r"(?<!\\)\|", line)) >= 3 for line in lines)
    assert all(
        line.count("|") == 4 + sum(c.count("|") for c in row)
        for line, row in zip(lines[2:], rows, strict=True)
    )
