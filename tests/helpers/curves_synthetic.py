"""Synthetic runs with curves, for tests of tables at equal attainment; nothing here is a result."""

import numpy as np
import pandas as pd
from evaluation_synthetic import tiny

from biscale_env.evaluation.runs import results, run_files
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.evaluation.stats.metrics import results_row

N_WINDOWS = 8
# per policy: settings as (energy of max clock's, attainment); the first was chosen
SETTINGS = {
    "max": [(1.0, 0.998)],
    "static-hindsight": [(0.80, 0.992), (0.78, 0.988), (0.90, 0.996)],
    "static-best": [],
    "saver": [(0.76, 0.996), (0.70, 0.985), (0.72, 0.990)],
    "lenient": [(0.85, 0.997), (0.88, 0.999)],
    "late": [(0.60, 0.97), (0.65, 0.98)],
}


def curve(settings, wobble=0.0, seed=0):
    """Rows of ``curves.parquet`` of settings, each window alike but for a wobble in common."""
    shape = 1.0 + wobble * np.random.default_rng(seed).normal(size=N_WINDOWS)
    frames = [
        pd.DataFrame(
            {
                "setting": f"margin={k}",
                "window": np.arange(N_WINDOWS, dtype=float),
                "day": 0.0,
                "energy_j": 100.0 * energy * shape,
                "n_met": 1000.0 * attained,
                "n_counted": 1000.0,
                "output_tokens": 5000.0,
                "copies": 1.0,
            }
        )
        for k, (energy, attained) in enumerate(settings)
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def members(energy, spread):
    """Rows of ``members.parquet``."""
    ratios = energy * (1.0 + spread * np.linspace(-1.0, 1.0, 5))
    return pd.DataFrame({"member": np.arange(5.0), "energy_j": ratios, "attainment": 1.0})


def records(scenario="conv", fold="forward", settings=None, member=-1, training_seed=-1, **labels):
    """A record per policy with the tables that go with it."""
    labels = {
        "workload": "conv",
        "fold": fold,
        "idle": "last-clock",
        "capacity_rps": 40.0,
        "tune_capacity_rps": 22.0,
        "one_trace": True,
        **labels,
    }
    for policy, curves in (settings or SETTINGS).items():
        energy, attained = curves[0] if curves else (0.82, 0.999)
        base = tiny(policy=policy, scenario=scenario, load=0.9, labels=labels)
        totals = {**base.totals, "energy_j": base.totals["energy_j"] * energy}
        record = tiny(
            policy=policy,
            scenario=scenario,
            load=0.9,
            labels=labels,
            ensemble_member=member,
            training_seed=training_seed,
            variant="" if policy.startswith(("max", "static")) else "tuned",
            totals=totals,
        )
        yield (
            record,
            attained,
            {
                run_files.CURVES: curve(curves, wobble=0.2),
                run_files.MEMBERS: members(energy, 0.0 if policy == "max" else 0.1),
            },
        )


def summary_of(parts):
    """Summary with the columns of curves and members, of records as :func:`records` gives them."""
    from biscale_env.evaluation.runs.equal_columns import add_equal_attainment
    from biscale_env.evaluation.runs.member_columns import add_member_range

    rows, frames = [], {run_files.CURVES: [], run_files.MEMBERS: []}
    for record, attained, tables in parts:
        rows.append(results_row(record) | {"attainment": attained})
        for name, frame in tables.items():
            if len(frame):
                frames[name].append(frame.assign(run_id=record.run_id))
    frame = results.results_frame(rows)
    summary = results.summarise(frame)
    curves, spread = (pd.concat(frames[name]) for name in (run_files.CURVES, run_files.MEMBERS))
    return add_member_range(add_equal_attainment(summary, frame, curves), frame, spread)


def keep(folder, parts):
    """A run directory that holds them."""
    with RunDirectory(folder, {"command": "compare"}) as run:
        for record, _, tables in parts:
            run.add(record, further=tables)
    return folder
