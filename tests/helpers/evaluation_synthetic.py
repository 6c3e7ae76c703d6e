"""Synthetic but plausible run records for the tests of evaluation; nothing here is a result."""

import numpy as np
import pandas as pd

from biscale_env.config.slo import Slo
from biscale_env.evaluation.runs.blocks import window_totals
from biscale_env.evaluation.runs.record import RunRecord

SLO = Slo(name="biscale", ttft_s=0.6, tpot_s=0.1, attainment=0.99)

# (energy factor, latency factor, mean clock, solver failures): invented, only so that figures have
# something to show.
POLICIES = {
    "max": (1.00, 0.50, 1980.0, 0),
    "static-best": (0.78, 0.85, 1410.0, 0),
    "mpc": (0.70, 0.92, 1250.0, 3),
    "slack": (0.74, 0.95, 1200.0, 0),
    "oracle": (0.66, 0.80, 1180.0, 0),
}


def requests_of(
    arrival_s, first_token_s, finish_s, output_tokens, start_s=None, prompt_tokens=None
):
    """Request arrays from plain lists."""
    arrival = np.asarray(arrival_s, dtype=float)
    return {
        "arrival_s": arrival,
        "start_s": arrival if start_s is None else np.asarray(start_s, dtype=float),
        "first_token_s": np.asarray(first_token_s, dtype=float),
        "finish_s": np.asarray(finish_s, dtype=float),
        "prompt_tokens": np.full(arrival.size, 100.0)
        if prompt_tokens is None
        else np.asarray(prompt_tokens, float),
        "output_tokens": np.asarray(output_tokens, dtype=float),
    }


def timeline_of(time_s, duration_s, idle_s, energy_j, freq_mhz=1980.0, n_gpus=4):
    """Decision arrays from plain lists."""
    time = np.asarray(time_s, dtype=float)
    columns = {
        "time_s": time,
        "duration_s": np.asarray(duration_s, float),
        "idle_s": np.asarray(idle_s, float),
    }
    columns["energy_j"] = np.asarray(energy_j, dtype=float)
    for name in ("freq_requested_mhz", "freq_applied_mhz", "freq_effective_mhz"):
        columns[name] = np.full(time.size, freq_mhz)
    columns["power_w"] = columns["energy_j"] / np.maximum(columns["duration_s"], 1e-9) / n_gpus
    for name in ("queue_requests", "batch_requests", "batch_tokens", "kv_use"):
        columns[name] = np.zeros(time.size)
    return columns


def tiny(phase="prefill", policy="max", requests=None, timeline=None, totals=None, **changes):
    """A record of three requests, small enough to judge by eye."""
    requests = requests or requests_of(
        [0.0, 1.0, 2.0], [0.5, 1.6, 2.7], [0.5, 1.6, 2.7], [10, 20, 1]
    )
    timeline = timeline or timeline_of(
        [0.0, 1.0, 2.0], [0.5, 0.6, 0.7], [0.5, 0.4, 0.3], [100.0, 200.0, 300.0]
    )
    totals = {"energy_j": 600.0, "duration_s": 3.0} | (totals or {})
    fields = {
        "scenario": "toy",
        "slo": SLO,
        "rate_rps": 1.0,
        "workload_seed": 0,
        "ensemble_member": -1,
        "tp": 4,
    }
    fields |= {"dtype": "bf16", "n_gpus": 4} | changes
    return RunRecord(
        phase=phase, policy=policy, requests=requests, timeline=timeline, totals=totals, **fields
    )


def windows_frame(records):
    """Totals per run and window of time, as a run directory keeps them."""
    return pd.concat(
        [pd.DataFrame(window_totals(record)).assign(run_id=record.run_id) for record in records]
    )


def plausible(
    phase="prefill", policy="max", seed=0, load=0.75, duration_s=300.0, rate_rps=6.0, **changes
):
    """A record that looks like a run.

    Bursts, a clock that follows them, latencies around the bound.
    """
    energy_factor, latency_factor, clock_mhz, failures = POLICIES.get(policy, POLICIES["max"])
    workload = np.random.default_rng([seed, 1])
    noise = np.random.default_rng([seed, sum(policy.encode())])
    burst = 1.0 + 0.8 * np.sin(
        2 * np.pi * np.arange(0, duration_s, 0.25) / 70.0
    ) * workload.uniform(0.5, 1.0)
    counts = workload.poisson(0.25 * rate_rps * burst)
    arrival = np.sort(
        np.repeat(np.arange(counts.size) * 0.25, counts) + workload.uniform(0, 0.25, counts.sum())
    )
    heat = np.interp(arrival, np.arange(burst.size) * 0.25, burst)
    output = np.minimum(workload.geometric(1 / 200, arrival.size), 1000).astype(float)
    spread = noise.gamma(6.0, 1 / 6.0, arrival.size)
    if phase == "prefill":
        first = arrival + SLO.ttft_s * 0.55 * latency_factor * (0.3 + 0.5 * heat * spread)
        requests = requests_of(arrival, first, first, output)
    else:
        token_s = SLO.tpot_s * 0.62 * latency_factor * (0.75 + 0.15 * heat + 0.1 * spread)
        requests = requests_of(
            arrival, arrival, arrival + token_s * np.maximum(output - 1, 0), output
        )
    step = 0.12 if phase == "prefill" else 0.05
    timeline = _timeline(phase, step, duration_s, burst, (energy_factor, clock_mhz, policy), noise)
    totals = {"energy_j": float(timeline["energy_j"].sum()), "duration_s": duration_s + 60.0}
    totals |= {
        "decision_time_median_s": 2e-3 if policy == "mpc" else 8e-6,
        "decision_time_p99_s": 4e-3,
    }
    totals |= {
        "solver_failures": failures if phase == "prefill" else 0,
        "energy_idle_j": 0.1 * totals["energy_j"],
    }
    fields = {
        "scenario": "synthetic",
        "slo": SLO,
        "rate_rps": arrival.size / duration_s,
        "load": load,
    }
    fields |= {
        "workload_seed": seed,
        "ensemble_member": -1,
        "tp": 4,
        "dtype": "bf16",
        "n_gpus": 4,
    } | changes
    return RunRecord(
        phase=phase, policy=policy, requests=requests, timeline=timeline, totals=totals, **fields
    )


def _timeline(phase, step, duration_s, burst, setting, noise):
    energy_factor, clock_mhz, policy = setting
    time = np.arange(0.0, duration_s, step)
    heat = np.interp(time, np.arange(burst.size) * 0.25, burst)
    moving = policy not in ("max", "static-best")
    clock = np.full(time.size, clock_mhz) + moving * (
        700.0 * (heat - 1.0) + noise.normal(0, 40, time.size)
    )
    clock = np.clip(np.round(clock / 15) * 15, 345, 1980)
    busy = (
        step * np.clip(0.45 + 0.4 * heat, 0, 1) if phase == "prefill" else np.full(time.size, step)
    )
    power = np.clip(
        690.0 * energy_factor * (0.55 + 0.25 * heat) + noise.normal(0, 12, time.size), 120, 700
    )
    return {
        "time_s": time,
        "duration_s": busy,
        "idle_s": step - busy,
        "freq_requested_mhz": clock,
        "freq_applied_mhz": clock,
        "freq_effective_mhz": np.minimum(clock, 1650.0),
        "power_w": power,
        "energy_j": 4 * (power * busy + 110.0 * (step - busy)),
        "queue_requests": noise.poisson(np.maximum(heat - 0.8, 0) * 4),
        "batch_requests": np.round(heat * (3 if phase == "prefill" else 60)),
        "batch_tokens": np.round(heat * (2500 if phase == "prefill" else 60)),
        "kv_use": np.clip(0.3 * heat, 0, 1),
    }
