"""Coarse policies on days that nothing was learned from or tuned on, window by window.

Every policy sees the same days of ``BiScale/Cluster-v1``: the integer programme with its default
headroom and with one that is tuned like the agent's price, and the learned agent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from agents.coarse.coarse_config import CoarseConfig
from agents.coarse.coarse_rollout import (
    BOUNDS,
    CoarseDay,
    Sums,
    least_careful,
    run_coarse_day,
    tuned_enough,
)
from agents.coarse.coarse_run import tuning_days
from agents.coarse.service_days import ServiceDay, all_days
from biscale_env.core.errors import BiscaleError
from biscale_env.core.markdown import markdown_table
from biscale_env.evaluation.stats.bootstrap import N_RESAMPLES, Interval, percentile_interval
from biscale_env.jobs.workers import Workers, in_order
from biscale_env.policies.coarse_resolver import resolve_coarse
from controllers.placement.coarse_rules import ALPHAS

HELD_OUT_SEED: Final = 100  # of gaps and lengths; training and tuning have others
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class CoarseSplit:
    """Days of some services that are judged together.

    Attributes:
        title: for people.
        services: rate profiles.
        days: days of each.
    """

    title: str
    services: tuple[str, ...]
    days: tuple[int, ...]


SPLITS: Final = (
    CoarseSplit("m-large, second week", ("servegen-m-large-fortnight",), tuple(range(7, 14))),
    CoarseSplit("m-small, second week", ("servegen-m-small-fortnight",), tuple(range(7, 14))),
    CoarseSplit("m-mid, not trained on", ("servegen-m-mid-fortnight",), tuple(range(7, 14))),
    CoarseSplit("Azure conversation, hourly rates", ("azure-conv-week",), (1, 2, 3)),
)


def coarse_day(config: CoarseConfig, name: str, day: ServiceDay) -> CoarseDay:
    """A day under a policy by name; a task for workers."""
    env = config.make_env()
    return run_coarse_day(env, resolve_coarse(name, env), day)


def coarse_row(config: CoarseConfig, name: str, day: ServiceDay) -> dict[str, Any]:
    """Sums of a day under a policy by name; a task for workers."""
    return {"policy": name, **coarse_day(config, name, day).row()}


def tuned_alpha(
    config: CoarseConfig, workers: Workers, say: Callable[[str], None]
) -> tuple[float, bool]:
    """Lowest headroom of the integer programme that is careful enough on the tuning days.

    Returns:
        The headroom, and whether it is careful enough.
    """
    required = config.make_env().plant.slo.attainment

    def is_enough(alpha: float) -> bool:
        calls = [(config, f"ilp:{alpha:g}", day) for day in tuning_days(config)]
        sums = Sums.of(in_order(coarse_row, calls, workers))
        say(f"tuning days at headroom {alpha:g}: {sums.told()}")
        return tuned_enough(sums, required)

    return least_careful(ALPHAS, is_enough)


def compare_coarse(
    config: CoarseConfig,
    policies: Sequence[str],
    workers: Workers,
    told: Told,
    splits: Sequence[CoarseSplit] = SPLITS,
    seed: int = HELD_OUT_SEED,
) -> pd.DataFrame:
    """Every policy on every day; a row each, with the title of its split.

    Args:
        config: cluster, windows, mean load; which days are no longer free.
        policies: names, as :func:`resolve_coarse` takes them.
        workers: where days are run.
        told: called with (done, all) after each.
        splits: which days.
        seed: of gaps and lengths.

    Raises:
        BiscaleError: a day that was learned from, or an unknown policy.
    """
    used = {*config.days, *config.validation_days}
    calls, titles = [], []
    for split in splits:
        learned = set(split.services) & set(config.services)
        if learned and used & set(split.days):
            raise BiscaleError(f"'{split.title}' has days of training: judge others")
        days = all_days(split.services, split.days, config.mean_rps, config.profile, seed)
        for day in days:
            for name in policies:
                calls.append((config, name, day))
                titles.append(split.title)
    frame = pd.DataFrame(in_order(coarse_row, calls, workers, told))
    return frame.assign(split=titles)


def energy_against(
    frame: pd.DataFrame, policy: str, reference: str, rng: np.random.Generator
) -> Interval:
    """Energy of a policy less that of a reference, %, with an interval over the days.

    Args:
        frame: rows of one split (:func:`compare_coarse`).
        policy: whose.
        reference: against whose.
        rng: of the resampling; whole days are drawn, the same for both.
    """
    keys = ["service", "day", "seed"]
    both = frame.pivot(index=keys, columns="policy", values="energy_j")
    both = both[list(dict.fromkeys([policy, reference]))].dropna()  # days that both have seen
    mine, other = both[policy].to_numpy(), both[reference].to_numpy()

    def percent(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(100 * (mine[rows].sum(axis=-1) / other[rows].sum(axis=-1) - 1))

    drawn = rng.integers(len(mine), size=(N_RESAMPLES, len(mine)))
    return percentile_interval(float(percent(np.arange(len(mine)))), percent(drawn))


def coarse_markdown(frame: pd.DataFrame, reference: str, required: float) -> str:
    """The table: a line per split and policy; struck through where the SLO is missed.

    Args:
        frame: rows of :func:`compare_coarse`.
        reference: policy that the others are compared with.
        required: attainment that the SLO asks for.
    """
    rows = []
    for split, part in frame.groupby("split", sort=False):
        for policy, mine in part.groupby("policy", sort=False):
            sums = Sums(*(float(mine[f.name].sum()) for f in fields(Sums)))
            kept = [sums.attained(bound) for bound in BOUNDS]
            met = min(kept) >= required
            change = energy_against(part, str(policy), reference, np.random.default_rng(0))
            against = "" if policy == reference else f"{change.estimate:+.1f} "
            if against:
                against += f"[{change.low:+.1f}, {change.high:+.1f}]"
            energy = f"{sums.energy_j / 3.6e6:.1f}"
            shown = [f"{100 * a:.2f}" for a in kept]
            each = [energy if met else f"~~{energy}~~", against, *shown]
            rows.append([split, f"`{policy}`", len(mine), *each, f"{mine['changes'].mean():.0f}"])
    heads = ["days", "policy", "number", "kWh", "energy against, %", "TTFT met, %", "TPOT met, %"]
    return markdown_table([*heads, "changes a day"], rows, "llr")
