"""What a user waits for first: the import, the environment, the first reset."""

import subprocess
import sys

import pytest
from meter import Meter, Metric

IMPORT = "import time; t = time.perf_counter(); import biscale_env; print(time.perf_counter() - t)"
MAKE = (
    "import time, biscale_env, gymnasium as gym; t = time.perf_counter();"
    "env = gym.make('BiScale/{phase}-v1'); print(time.perf_counter() - t);"
    "t = time.perf_counter(); env.reset(seed=0); print(time.perf_counter() - t)"
)


def told(code: str) -> list[float]:
    """Numbers that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def test_import(meter: Meter) -> None:
    """Wall time of the import in a fresh interpreter, without the interpreter's own start."""
    spent = meter.once(lambda: sorted(told(IMPORT)[0] for _ in range(5)))
    meter.keep(Metric("import biscale_env", spent[0], "s", 1.0, "lower", spent[2]))


@pytest.mark.parametrize("phase", ["Prefill", "Decode"])
def test_make_and_first_reset(meter: Meter, phase: str) -> None:
    """Wall time of gym.make with a capacity found before, and of the first reset after it."""
    told(MAKE.format(phase=phase))  # finds the capacity, compiles the kernels
    runs = meter.once(lambda: [told(MAKE.format(phase=phase)) for _ in range(5)])
    made, first = (sorted(column) for column in zip(*runs, strict=True))
    meter.keep(
        Metric(f"gym.make, {phase}, capacity known", made[0], "s", 0.3, "lower", made[2]),
        Metric(f"first reset, {phase}", first[0] * 1e3, "ms", 50.0, "lower", first[2] * 1e3),
    )
