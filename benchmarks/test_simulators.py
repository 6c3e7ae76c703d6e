"""The compiled simulators at a constant clock: an hour of conversation through both phases."""

import numpy as np
import pytest
from meter import Meter

from biscale_env.envs.loads.capacity import StaticRun, run_static
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.traces import Trace, generate

HOUR_S = 3600.0
CONV_RPS = 5.38  # Azure conversation 2023: 19,366 requests in an hour


def handed_over(trace: Trace, run: StaticRun) -> Trace:
    """The requests as they leave prefill: the workload of decode."""
    ready_s = trace.arrival_s + run.latency_s
    order = np.argsort(ready_s, kind="stable")
    prompts, outputs = trace.prompt_tokens[order], trace.output_tokens[order]
    return Trace(trace.name, ready_s[order], prompts, outputs, trace.source)


@pytest.fixture(scope="module")
def plants() -> tuple[Plant, Plant]:
    """The default prefill and decode instance."""
    return Plant(PlantSettings.of("prefill")), Plant(PlantSettings.of("decode"))


@pytest.fixture(scope="module")
def hour() -> Trace:
    """An hour like the Azure conversation trace, generated from its statistics."""
    return generate("azure-conv-like", rate_rps=CONV_RPS, duration_s=HOUR_S, seed=0)


def test_hour_through_both_phases(meter: Meter, plants: tuple[Plant, Plant], hour: Trace) -> None:
    """The whole hour through one prefill and one decode instance at the highest clock."""
    prefill, decode = plants
    top = prefill.gpu.freq_max_mhz

    def both() -> StaticRun:
        return run_static(decode, handed_over(hour, run_static(prefill, hour, top)), top)

    meter.time(both, f"{hour.name} ({len(hour)} requests), prefill + decode", "ms", 20.0)


def test_decode_iterations(meter: Meter, plants: tuple[Plant, Plant], hour: Trace) -> None:
    """Decode iterations per second."""
    prefill, decode = plants
    top = prefill.gpu.freq_max_mhz
    ready = handed_over(hour, run_static(prefill, hour, top))
    n = run_static(decode, ready, top).iterations
    work = lambda: run_static(decode, ready, top)  # noqa: E731
    meter.rate(work, n, f"decode iterations ({n})", "1/s", 10e6)
