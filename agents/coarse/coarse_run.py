"""A training run of the coarse loop in one directory: costs, forecast, default price.

Each part is a file once it is finished, so that an interrupted run goes on where it was.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from agents.coarse.coarse_agent import CoarseAgent
from agents.coarse.coarse_checkpoint import CoarseCheckpoint, load_coarse
from agents.coarse.coarse_config import CoarseConfig
from agents.coarse.coarse_rollout import Sums, least_careful, run_coarse_day, tuned_enough
from agents.coarse.service_days import ServiceDay
from agents.coarse.window_costs import kinds_of, measure_costs
from agents.training.run_config import open_config
from biscale_env.core.files import lock, write_whole
from biscale_env.jobs.workers import Workers, in_order
from controllers.placement.load_plans import LoadPlans

BEST: Final = "best.npz"
UNTUNED: Final = "untuned.npz"
TUNING: Final = "tuning.json"
N_PRICES: Final = 12
TUNING_SEED: Final = 1  # of gaps and lengths
Say = Callable[[str], None]


def train_coarse(
    config: CoarseConfig, folder: Path, resume: bool, workers: Workers, say: Say
) -> CoarseCheckpoint:
    """Train from scratch or go on; ``best.npz`` in the folder is the result.

    Args:
        config: of the run.
        folder: its directory.
        resume: go on with a run that is there.
        workers: where days are run.
        say: takes the lines of progress.

    Raises:
        BiscaleError: there is a run that may not be resumed, or none to resume.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", what=f"training run {folder}"):
        open_config(folder, config.model_dump(mode="json"), resume)
        if not (folder / UNTUNED).is_file():
            _learned(config, say).save(folder / UNTUNED)
        untuned = load_coarse(folder / UNTUNED)
        price, days, met = tune_price(config, untuned, folder / TUNING, workers, say)
        card = {"config": config.model_dump(mode="json"), "tuning": days, "tuned_met": met}
        made = CoarseCheckpoint(
            untuned.forecast, untuned.costs, config.window_s, config.price, price, card
        )
        made.save(folder / BEST)
        return made


def _learned(config: CoarseConfig, say: Say) -> CoarseCheckpoint:
    from agents.coarse.forecast_fit import fit_forecast  # torch, which only training needs

    env = config.make_env()
    kinds = kinds_of(env, LoadPlans.of_env(env), config.measured_s)

    def told(done: int, number: int) -> None:
        if done % 4 == 0 or done == number:
            say(f"costs of windows: {done} of {number} kinds of instances")

    costs = measure_costs(env, kinds, told)
    forecast = fit_forecast(config, say)
    middle = float(np.sqrt(config.price[0] * config.price[1]))
    return CoarseCheckpoint(forecast, costs, config.window_s, config.price, middle)


def tuning_days(config: CoarseConfig) -> list[ServiceDay]:
    """Days that free parameters are chosen on: the last ones of training and validation."""
    known = sorted((*config.days, *config.validation_days))
    return config.service_days(tuple(known[-config.tuning_days :]), TUNING_SEED)


def agent_day(config: CoarseConfig, made: CoarseCheckpoint, day: ServiceDay) -> dict[str, Any]:
    """Sums of a day under the agent at its default price; a task for workers."""
    env = config.make_env()
    return run_coarse_day(env, CoarseAgent(made, env), day).row()


def tune_price(
    config: CoarseConfig, made: CoarseCheckpoint, kept: Path, workers: Workers, say: Say
) -> tuple[float, Sequence[Mapping[str, Any]], bool]:
    """Lowest price that is careful enough on the tuning days.

    Args:
        config: of the run.
        made: the agent.
        kept: file of the prices that were tried already.
        workers: where days are run.
        say: takes a line per price.

    Returns:
        The price, sums of the tuning days at it, and whether it is careful enough.
    """
    known: dict[str, list[dict[str, Any]]] = json.loads(kept.read_text()) if kept.is_file() else {}
    required = config.make_env().plant.slo.attainment

    def is_enough(price: float) -> bool:
        if str(price) not in known:
            calls = [(config, made.at_price(price), day) for day in tuning_days(config)]
            known[str(price)] = in_order(agent_day, calls, workers)
            write_whole(kept, json.dumps(known, indent=1))
        sums = Sums.of(known[str(price)])
        say(f"tuning days at price {price:g}: {sums.told()}")
        return tuned_enough(sums, required)

    prices = [float(f"{p:.3g}") for p in np.geomspace(*config.price, N_PRICES)]
    price, met = least_careful(prices, is_enough)
    is_enough(price)
    return price, known[str(price)], met
