"""A trace file of several days, invented: a few minutes of traffic at noon, days that differ."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from biscale_env.traces import Trace, generate

NOON_S = 12 * 3600.0
LEVELS = (0.6, 1.5, 0.8, 1.2, 1.0, 0.7)
"""Mean rate of each day's traffic, as a multiple of `RATE_RPS`."""
RATE_RPS = 3.0


def days_of_traffic(levels=LEVELS, seconds=240.0, profile="gamma-sharegpt-like") -> list[Trace]:
    """Traffic of each day, times counted from its noon."""
    return [
        generate(profile, rate_rps=RATE_RPS * level, duration_s=seconds, seed=day)
        for day, level in enumerate(levels)
    ]


def write_days(path: Path, days: list[Trace]) -> Path:
    """A CSV of dates, the first of them 2024-05-10 at noon, with one last request a day behind."""
    start = datetime(2024, 5, 10, 12, tzinfo=UTC)
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for day, trace in enumerate(days):
        times = np.concatenate([[0.0], trace.arrival_s[1:]])  # windows start with the traffic
        rows += [
            f"{start + timedelta(days=day, seconds=float(t))},{prompt},{output}"
            for t, prompt, output in zip(
                times, trace.prompt_tokens, trace.output_tokens, strict=True
            )
        ]
    rows.append(f"{start + timedelta(days=len(days))},5,5")
    path.write_text("\n".join(rows) + "\n")
    return path
