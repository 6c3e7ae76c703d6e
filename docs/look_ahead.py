"""What looking an iteration ahead is worth, on emulated engines in virtual time.

The same load, policy and clocks three times: an engine that forms a batch when it begins (as
reference), one that schedules asynchronously and is controlled as if its records were of now, and
the same with the controller looking ahead.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from biscale_env.core.markdown import markdown_table
from biscale_env.envs.loads.workloads import generated
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.policies import resolve_policy
from biscale_env.traces import Trace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
from virtual_engine import VirtualRun, run_virtually

POLICIES = {"prefill": ("mpc",), "decode": ("slack",)}
RATES_RPS = {"prefill": 2.3, "decode": 16.0}  # three quarters of what max clock serves
DURATION_S = 8.0
DELAY_S = 0.05
WAYS = {  # name: (engine schedules asynchronously, controller looks ahead)
    "synchronous engine": (False, True),
    "asynchronous, without looking ahead": (True, False),
    "asynchronous, looking ahead": (True, True),
}
HEAD = ("policy", "engine and controller", "begin off by, P50", "P99", "energy", "within the SLO")


def _answered(made: Trace) -> Trace:
    """The requests of two tokens or more: decode never sees the others."""
    keep = made.output_tokens > 1
    columns = (made.arrival_s[keep], made.prompt_tokens[keep], made.output_tokens[keep])
    return Trace(made.name, *columns, made.source)


def _errors_ms(run: VirtualRun, look_ahead: bool) -> tuple[str, str]:
    """How far off the begin of iterations was taken to be, median and P99."""
    off_s = np.abs(run.lead_error_s if look_ahead else run.naive_error_s)
    if not len(off_s):
        return "0", "0"
    p50, p99 = 1e3 * np.quantile(off_s, [0.5, 0.99])
    return f"{p50:.2f} ms", f"{p99:.2f} ms"


def rows(duration_s: float = DURATION_S) -> list[tuple[str, ...]]:
    """The table's rows: every policy in the three ways."""
    found = []
    for phase, names in POLICIES.items():
        plant = Plant(PlantSettings.of(phase, actuation_delay_s=DELAY_S, drain=True))
        load = _answered(generated("azure-conv-like")(RATES_RPS[phase], duration_s, 0))
        for name in names:
            reference_j = 0.0
            for way, (asynchronous, look_ahead) in WAYS.items():
                policy = resolve_policy(name, plant)
                with tempfile.TemporaryDirectory() as folder:
                    run = run_virtually(Path(folder), plant, policy, load, asynchronous, look_ahead)
                reference_j = reference_j or run.energy_j
                met = float((run.latency_s <= plant.slo.bound_s(phase)).mean())
                found.append(
                    (
                        f"{phase}, {name}",
                        way,
                        *_errors_ms(run, look_ahead),
                        f"{run.energy_j / reference_j:.4f}",
                        f"{100 * met:.2f} %",
                    )
                )
    return found


def markdown(duration_s: float = DURATION_S) -> str:
    """The table; energy is relative to the synchronous engine under the same policy."""
    return markdown_table(HEAD, rows(duration_s))
