"""Kernels as plain Python (NUMBA_DISABLE_JIT=1) do what the compiled ones do."""

import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

from biscale_env.core.jit import as_records, interpreted

DTYPE = np.dtype([("time_s", np.float64), ("sums", np.float64, (2,))])


class Group(NamedTuple):
    """Records and numbers."""

    states: np.ndarray
    n: int


def test_records_share_memory_and_have_attributes() -> None:
    states = np.zeros(3, dtype=DTYPE)
    group = as_records((Group(states, 3), states[1]))
    group[0].states[0].time_s = 1.5
    group[1].time_s = 2.5
    group[1].sums[1] = 7.0
    assert states["time_s"].tolist() == [1.5, 2.5, 0.0]
    assert states["sums"][1].tolist() == [0.0, 7.0]
    assert isinstance(group[0], Group)
    assert group[0].n == 3


def test_what_is_no_record_stays_the_same_object() -> None:
    array = np.zeros(3)
    assert as_records(array) is array
    assert as_records(2.0) == 2.0


def test_division_is_that_of_ieee() -> None:
    @interpreted
    def ratio(a: float, b: float) -> float:
        """A quotient."""
        return a / b

    assert np.isinf(ratio(np.float64(1.0), np.float64(0.0)))
    assert ratio.__doc__ == "A quotient."


CODE = """
import numpy as np
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.traces import generate
for phase in ("prefill", "decode"):
    plant = Plant(PlantSettings.of(phase))
    table = RequestTable.of(plant, [generate("azure-conv-like", rate_rps=4.0, duration_s=5.0)])
    batch = Batch(plant, 1, table, record=True)
    rows = np.zeros(1, dtype=np.int64)
    batch.reset(rows, rows, rows - 1)
    for k in range(60):
        batch.step(np.full(1, np.sin(k), dtype=np.float32))
    st = batch.states[0]
    print([float(st[n]).hex() for n in ("time_s", "energy_j", "freq_ghz")], int(st["finished"]))
    print([float(x).hex() for x in batch.obs[0]], float(batch.reward[0]).hex())
"""


@pytest.mark.slow
def test_an_environment_runs_the_same_without_compiler() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-c", CODE],
            env={**os.environ, "NUMBA_DISABLE_JIT": off},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for off in ("1", "0")
    ]
    plain, fast = (np.array(_numbers(text)) for text in outputs)
    assert len(plain) > 80
    np.testing.assert_allclose(plain, fast, rtol=1e-9, atol=1e-12)


def _numbers(text: str) -> list[float]:
    words = text.replace("[", " ").replace("]", " ").replace(",", " ").replace("'", " ").split()
    return [float.fromhex(w) for w in words]
