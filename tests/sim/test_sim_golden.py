"""Golden trajectories: dynamics, reward and observation are what they were when the files were
made.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
assert _spec is not None
assert _spec.loader is not None
make_golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_golden)


def stored(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def test_no_golden_file_is_missing_or_left_over() -> None:
    assert {p.stem for p in GOLDEN.glob("*.json")} == set(make_golden.CASES)


@pytest.mark.parametrize("name", make_golden.CASES)
def test_golden_file_is_not_stale(name: str) -> None:
    """The generator, run now, would start from the very inputs of the file; else.

    Run tests/golden/make_golden.py.
    """
    found = stored(name)
    assert make_golden.digest(found["inputs"]) == found["inputs_digest"], (
        "the file was edited by hand"
    )
    assert (
        make_golden.digest(json.loads(json.dumps(make_golden.inputs(name))))
        == found["inputs_digest"]
    )


@pytest.mark.parametrize("name", make_golden.CASES)
def test_trajectory_is_unchanged(name: str) -> None:
    """An intended change raises the version of the environment ids and makes the files anew."""
    found = stored(name)
    again = make_golden.play(found["inputs"])
    for key, expected in found["outputs"].items():
        assert len(again[key]) == len(expected) > 0
        np.testing.assert_allclose(
            again[key],
            expected,
            rtol=1e-9 if "reward" in key else 1e-5,
            atol=1e-7,
            err_msg=f"{name}: {key}",
        )


def test_golden_cases_reach_what_they_are_for() -> None:
    """Late requests, preemptions, chunks and idling all occur in the stored trajectories."""
    late = sum(
        step[3]
        for name in make_golden.CASES
        for step in stored(name)["outputs"]["time_s, energy_j, reward, violations"]
    )
    assert late > 0
    recompute = [
        row[3] for row in stored("decode-tight")["outputs"]["observations of every tenth step"]
    ]
    waiting = [
        row[4] for row in stored("decode-tight")["outputs"]["observations of every tenth step"]
    ]
    assert max(recompute + waiting) > 0
