"""What the simulator's tests share.

A plant with coefficients of its own, so that a new fit changes no expected value.
"""

from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as some
from reference_sim import DecodeInstance, Instance, PrefillInstance, Request, Settings

from biscale_env.config.slo import MOST_CLASSES
from biscale_env.contract import spec_for
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant
from biscale_env.models.physics import Coefficients
from biscale_env.sim.state import PARAMS_DTYPE
from biscale_env.traces import Trace
from biscale_env.traces.request_classes import RequestClasses

# Near the published TP4 bf16 figures, rounded: plausible, and frozen here.
COEFFICIENTS = Coefficients(
    n_gpus=4.0,
    freq_profile_ghz=1.98,
    weights_s=0.012,
    gemm0_s=1.2e-3,
    gemm_s_per_token=4.6e-05,
    experts_s=0.0,
    expert_s_per_token=0.0,
    expert_miss=0.0,
    expert_skew=1.0,
    window_tokens=0.0,
    window_share=0.0,
    attn0_s=9e-4,
    attn_prefill_s=8e-10,
    attn_decode_s=2.6e-08,
    comm0_s=8e-4,
    comm_s_per_token=1.7e-05,
    elem0_s=7e-4,
    elem_s_per_token=8.5e-06,
    host0_s=1.1e-3,
    host_s_per_seq=2e-5,
    stream_knee_ghz=0.7,
    core_share=0.3,
    v_knee_ghz=1.1,
    v_slope_per_ghz=0.45,
    p_static_w=90.0,
    p_clock_w_per_ghz=30.0,
    p_busy_w=60.0,
    p_seq_w=100.0,
    flops_per_token=3.5e10,
    flops_per_attn=6.5e5,
    weight_bytes=3.5e10,
    expert_bytes=0.0,
    expert_core_bytes=0.0,
    bytes_per_token=1e7,
    kv_bytes_per_token=8.2e4,
    link_bytes_per_token=2e6,
    energy_factor=1.1,
    e_flop_j=3.4e-13,
    few_rows_saving=0.3,
    e_byte_j=1e-11,
    e_hbm_j=4e-11,
    e_link_j=1e-11,
    p_cap_w=700.0,
)


# 128 experts, 8 of them per row, and every other layer with a window of 128 tokens.
EXPERTS = {
    "experts_s": 0.02,
    "expert_s_per_token": 3e-5,
    "expert_miss": 1.0 - 8 / 128,
    "expert_skew": 0.8,
    "expert_bytes": 5e10,
    "expert_core_bytes": 1e11,
}
WINDOW = {"window_tokens": 128.0, "window_share": 0.5}


def plain(**changes: float) -> Coefficients:
    """Coefficients of an instance whose iteration takes ``host0_s`` whatever the clock, and whose
    power is easy to add up.
    """
    zero = dict.fromkeys(Coefficients._fields, 0.0)
    base = {"n_gpus": 1.0, "freq_profile_ghz": 1.98, "p_cap_w": 1e9, "v_knee_ghz": 1e3}
    base |= {"expert_skew": 1.0, "energy_factor": 1.0}
    return Coefficients(**{**zero, **base, **changes})


class StubPlant:
    """The part of a Plant that a Batch needs."""

    check_fits = Plant.check_fits

    def __init__(self, phase: str, c: Coefficients, settings: Settings) -> None:
        self.phase, self.spec = phase, spec_for(phase)
        self.settings = SimpleNamespace(
            max_seqs=settings.max_seqs,
            min_decision_interval_s=settings.min_interval_s,
            means="lock",
        )
        self.kv_capacity_tokens = settings.kv_capacity
        self.model = SimpleNamespace(member=lambda k: c)
        self._settings = settings

    def class_numbers(self, trace: Trace) -> np.ndarray | None:
        return None if self._settings.classes == 0 else numbers_of(trace)

    def params(self, draw: int, end_s: float) -> np.ndarray:
        record = np.zeros((), dtype=PARAMS_DTYPE)
        for name, value in asdict(self._settings).items():
            record[name] = value
        record["end_s"] = end_s
        return record


def numbers_of(trace: Trace) -> np.ndarray:
    """SLO class of each request of a trace whose classes are called by their numbers."""
    return np.array([int(name) for name in trace.classes.each()], dtype=np.int8)


def workload(rows: list[tuple[float, int, int]], end_s: float) -> Trace:
    """A trace of (arrival, prompt, output) rows."""
    rows = sorted(rows, key=lambda r: r[0])
    return Trace(
        "test",
        np.array([r[0] for r in rows], dtype=float),
        np.array([r[1] for r in rows]),
        np.array([r[2] for r in rows]),
        "made by a test",
        duration_s=end_s,
    )


def compiled(phase: str, c: Coefficients, settings: Settings, trace: Trace, n: int = 1) -> Batch:
    """A fresh batch on one workload."""
    plant: Any = StubPlant(phase, c, settings)
    batch = Batch(plant, n, RequestTable.of(plant, [trace]), record=n == 1)
    zeros = np.zeros(n, dtype=np.int64)
    batch.reset(np.arange(n), zeros, zeros)
    return batch


def reference(phase: str, c: Coefficients, settings: Settings, trace: Trace) -> Instance:
    """The slow twin."""
    rows = zip(
        trace.arrival_s.tolist(),
        trace.prompt_tokens.tolist(),
        trace.output_tokens.tolist(),
        strict=True,
    )
    numbers = numbers_of(trace).tolist() if settings.classes else [0] * len(trace)
    requests = [
        Request(i, *row, slo_class=number)
        for i, (row, number) in enumerate(zip(rows, numbers, strict=True))
    ]
    return (PrefillInstance if phase == "prefill" else DecodeInstance)(c, settings, requests)


def clock_of(settings: Settings, action: float) -> float:
    """Clock that an action asks for, GHz."""
    return settings.freq_min_ghz + (action + 1.0) / 2.0 * (
        settings.freq_max_ghz - settings.freq_min_ghz
    )


def run_out(batch: Batch, actions: list[float], limit: int = 20_000) -> list[np.ndarray]:
    """Step to the end with actions taken in turn.

    Returns a copy of the state record after every step.
    """
    states = []
    for k in range(limit):
        if batch.done.all():
            return states
        batch.step(np.array([actions[k % len(actions)]] * batch.n, dtype=np.float32))
        states.append(batch.states.copy())
    raise AssertionError(f"no end after {limit} steps")


times = some.one_of(some.just(0.0), some.floats(0.0, 4.0))
actions = some.lists(some.floats(-1.0, 1.0, width=32), min_size=1, max_size=12)
delays = some.one_of(some.just(0.0), some.sampled_from([0.003, 0.05, 0.3]))
# fields of Settings: half of the plants wait at their last clock, half are parked
idle_rules = some.one_of(
    some.just({"parked": 0}),
    some.builds(
        lambda power_w, ramp_s: {"parked": 1, "parked_w": power_w, "parked_ramp_s": ramp_s},
        some.sampled_from([0.0, 85.0, 150.0]),
        some.sampled_from([0.0, 0.002, 0.05, 0.4]),
    ),
)


@some.composite
def classed(draw: Any, settings: Settings, trace: Trace) -> tuple[Settings, Trace]:
    """A case as it is, or its requests in SLO classes, tighter and wider ones."""
    n = draw(some.sampled_from([0, 0, 3]))
    if n == 0:
        return settings, trace
    numbers = draw(some.lists(some.integers(0, n - 1), min_size=len(trace), max_size=len(trace)))
    rest = (1.0,) * (MOST_CLASSES - n)
    changes = {
        "classes": n,
        "class_scale": (1.0, draw(some.sampled_from([0.3, 2.0])), 5.0, *rest),
        "class_weight": (1.0, 2.5, 0.2, *rest),
    }
    classes = RequestClasses.of([str(number) for number in numbers])
    return replace(settings, **changes), replace(trace, classes=classes)


@some.composite
def coefficients(draw: Any) -> Coefficients:
    """Coefficients of which those that matter for the dynamics vary."""
    return COEFFICIENTS._replace(
        n_gpus=draw(some.sampled_from([1.0, 2.0, 4.0, 8.0])),
        p_cap_w=draw(some.sampled_from([150.0, 300.0, 400.0, 700.0])),
        v_slope_per_ghz=draw(some.floats(0.0, 0.8)),
        v_knee_ghz=draw(some.floats(0.9, 1.4)),
        core_share=draw(some.floats(0.0, 1.0)),
        attn_decode_s=draw(some.sampled_from([0.0, 2.6e-8, 1e-6])),
        **draw(some.sampled_from([{}, EXPERTS, WINDOW, EXPERTS | WINDOW])),
    )


@some.composite
def prefill_cases(draw: Any) -> tuple[Settings, Trace]:
    """Small prefill plants, some with tiny budgets and batches."""
    end_s = draw(some.sampled_from([0.5, 3.0, 5.0]))
    rows = draw(
        some.lists(
            some.tuples(times, some.integers(1, 3000), some.just(1)), min_size=1, max_size=25
        )
    )
    rows = [(min(t, end_s), n, o) for t, n, o in rows]
    settings = Settings(
        token_budget=draw(some.sampled_from([7, 64, 500, 2048])),
        max_seqs=draw(some.sampled_from([1, 2, 256])),
        delay_s=draw(delays),
        min_interval_s=draw(some.sampled_from([0.0, 0.2])),
        slo_s=draw(some.sampled_from([0.05, 0.6])),
        end_s=end_s,
        drain=draw(some.integers(0, 1)),
        **draw(idle_rules),
    )
    if settings.token_budget == 7:
        rows = [(t, 1 + n % 60, o) for t, n, o in rows]
    return draw(classed(settings, workload(rows, end_s)))


@some.composite
def decode_cases(draw: Any) -> tuple[Settings, Trace]:
    """Small decode plants; a third of them with so little KV that requests are preempted."""
    end_s = draw(some.sampled_from([0.3, 2.0, 4.0]))
    tight = draw(some.integers(0, 2)) == 0
    prompts = some.integers(1, 20) if tight else some.integers(1, 4000)
    rows = draw(
        some.lists(some.tuples(times, prompts, some.integers(2, 40)), min_size=1, max_size=25)
    )
    rows = [(min(t, end_s), n, o) for t, n, o in rows]
    capacity = draw(some.integers(60, 150)) if tight else 400_000
    settings = Settings(
        max_seqs=draw(some.sampled_from([1, 3, 8, 256])),
        kv_capacity=capacity,
        kv_watermark=draw(some.sampled_from([0.0, 0.01, 0.2])),
        delay_s=draw(delays),
        min_interval_s=draw(some.sampled_from([0.0, 0.2])),
        slo_s=draw(some.sampled_from([0.02, 0.1])),
        end_s=end_s,
        drain=draw(some.integers(0, 1)),
        **draw(idle_rules),
    )
    return draw(classed(settings, workload(rows, end_s)))
