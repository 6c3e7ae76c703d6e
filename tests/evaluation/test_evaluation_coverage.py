"""Whether 95 % intervals hold the truth 95 times in 100: known processes, then real rollouts.

A workload is a load in cells of 10 s; max clock's energy and a policy's depend on it. The truth is
that of a very long run of the same process.
"""

import numpy as np
import pytest
from slow_values import slow

from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.evaluation.stats.windows import (
    WINDOW_S,
    attainment_interval,
    ratio_interval,
    window_weights,
)
from biscale_env.policies import resolve_policy
from biscale_env.traces import Trace, generate
from biscale_env.traces.synthetic.profiles import load_envelope

CELL_S = 10.0
PER_WINDOW = round(WINDOW_S / CELL_S)
REPEATS = 400


def swinging(rng, n_cells, n_series, time_s=120.0):
    """Load that swings with a correlation time, shape (n_series, n_cells), mean about 1."""
    keep = np.exp(-CELL_S / time_s)
    load = rng.normal(size=(n_series, n_cells))
    for t in range(1, n_cells):
        load[:, t] = keep * load[:, t - 1] + np.sqrt(1 - keep**2) * load[:, t]
    return np.clip(1.0 + 0.3 * load, 0.1, None)


def bursty(rng, n_cells, n_series):
    """Load 0.7 with bursts of 2 that begin at any cell and last 20 s on average."""
    on = np.zeros((n_series, n_cells), dtype=bool)
    on[:, 0] = rng.random(n_series) < 0.15
    for t in range(1, n_cells):
        chance = rng.random(n_series)
        on[:, t] = np.where(on[:, t - 1], chance < 0.5, chance < 0.09)
    return np.where(on, 2.0, 0.7) * rng.gamma(30.0, 1 / 30.0, on.shape)


def energies(rng, load):
    """Energy of a policy and of max clock per cell: what is saved shrinks with the load."""
    top = 100.0 * (0.4 + 0.6 * load)
    return top * (0.55 + 0.2 * np.clip(load, 0, 2)) * rng.normal(1.0, 0.02, load.shape), top


def per_window(cells):
    return cells.reshape(*cells.shape[:-1], -1, PER_WINDOW).sum(axis=-1)


def truth_of(process, seed=99):
    own, top = energies(
        np.random.default_rng(seed), process(np.random.default_rng(seed), 40, 50_000)
    )
    return own.sum() / top.sum()


def covered(truth, intervals):
    return np.mean([low <= truth <= high for _, low, high in intervals])


def by_windows(rng, own, top, load, **options):
    """The interval of this project for one series of cells."""
    own, top, load = per_window(own), per_window(top), per_window(load)
    weights = window_weights(own.size, rng, 500, series=[own / top], load=load, **options)
    return ratio_interval(own, top, weights)


def by_blocks_of_30_s(rng, own, top):
    """The interval of version 0.1: independent blocks of 30 s, plain percentiles."""
    own, top = own.reshape(-1, 3).sum(axis=1), top.reshape(-1, 3).sum(axis=1)
    taken = rng.multinomial(own.size, np.full(own.size, 1 / own.size), 500)
    low, high = np.quantile((taken @ own) / (taken @ top), [0.025, 0.975])
    return own.sum() / top.sum(), low, high


@pytest.mark.parametrize("minutes", [10, slow(30), slow(60)])
@pytest.mark.parametrize("process", [bursty, swinging])
def test_energy_ratio_is_covered(process, minutes):
    """Ten minutes are too short for a load that swings over two: that is the one exception."""
    rng = np.random.default_rng([minutes, process is bursty])
    load = process(rng, 6 * minutes, REPEATS)
    own, top = energies(rng, load)
    truth = truth_of(process)
    found = [by_windows(rng, *series) for series in zip(own, top, load, strict=True)]
    lowest = 0.83 if (process, minutes) == (swinging, 10) else 0.91
    assert lowest <= covered(truth, found) <= 0.98
    old = [by_blocks_of_30_s(rng, *series) for series in zip(own, top, strict=True)]
    if process is swinging:
        assert covered(truth, old) < 0.7
        widths = [np.mean([high - low for _, low, high in one]) for one in (found, old)]
        assert widths[0] > 2 * widths[1]


@pytest.mark.slow
def test_resampling_subsamples_as_if_they_were_workloads_does_not_cover():
    """Student's interval over five subsamples of one half hour, as tables had it."""
    rng = np.random.default_rng(5)
    load = swinging(rng, 180, REPEATS)
    truth, over_seeds, over_windows = truth_of(swinging), [], []
    for one in load:
        seeds = np.stack([energies(rng, one * rng.normal(1.0, 0.02, one.shape)) for _ in range(5)])
        ratios = seeds[:, 0].sum(axis=1) / seeds[:, 1].sum(axis=1)
        half = 2.776 * ratios.std(ddof=1) / np.sqrt(5)
        over_seeds.append((0.0, ratios.mean() - half, ratios.mean() + half))
        over_windows.append(by_windows(rng, *seeds.sum(axis=0), one))
    assert covered(truth, over_seeds) < 0.25
    assert 0.91 <= covered(truth, over_windows) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("process", [bursty, swinging])
def test_attainment_is_covered_where_bursts_are_late(process):
    """Requests are late with the load: a few per cent on average, none in many windows.

    (Of misses that most half hours do not see, no half hour can speak.)
    """
    rng = np.random.default_rng([6, process is bursty])

    def met_of(load):
        counted = rng.poisson(40 * load)
        late = np.clip(0.12 * (load - 1.1), 0.0, 1.0)
        return rng.binomial(counted, 1 - late), counted

    met, counted = met_of(process(rng, 40, 50_000))
    truth = met.sum() / counted.sum()
    found = []
    for load in process(rng, 180, REPEATS):
        met, counted = (per_window(cells) for cells in met_of(load))
        weights = window_weights(15, rng, 500, series=[met / counted], load=counted)
        found.append(attainment_interval(met, counted, weights))
    assert 0.91 <= covered(truth, found) <= 0.99


@pytest.mark.slow
def test_days_of_a_week_are_covered():
    """Half an hour of each of seven days: the envelope differs from day to day.

    Windows of all days taken as if they were alike do not cover.
    """
    rng = np.random.default_rng(7)
    factors = np.array(load_envelope("azure-conv-week").factors)
    days, whole, pooled = np.repeat(np.arange(7), 15), [], []

    def week(n_days):
        level = rng.choice(factors, n_days)[:, None]
        load = np.clip(level * swinging(rng, 180, n_days, 60.0), 0.05, None)
        return (per_window(cells) for cells in (*energies(rng, load), load))

    own, top, _ = week(20_000)
    truth = own.sum() / top.sum()
    for _ in range(REPEATS):
        own, top, load = (cells.ravel() for cells in week(7))
        weights = window_weights(105, rng, 500, days=days, series=[own / top], load=load)
        whole.append(ratio_interval(own, top, weights))
        flat = rng.multinomial(105, np.full(105, 1 / 105), 500)
        pooled.append(ratio_interval(own, top, flat))
    assert 0.91 <= covered(truth, whole) <= 0.98
    assert covered(truth, pooled) < 0.75


@pytest.mark.slow
def test_copies_of_a_trace_are_one_stretch_of_time():
    """Five shifted copies of ten or thirty minutes, five subsamples: lengths vary with time.

    Windows of the run (as if copies were further traffic) cover half of the time.
    """
    rng = np.random.default_rng(8)
    copies, n_windows = 5, 15
    n_cells, of_run, of_trace, estimates = n_windows * PER_WINDOW, [], [], []
    for _ in range(REPEATS // 2):
        work = swinging(rng, n_cells, 1, 60.0)[0]
        run, trace = np.zeros((3, n_cells)), np.zeros((3, n_cells))
        for _seed in range(5):
            shifts = [0, *rng.integers(0, n_cells, copies - 1)]
            load = np.mean([np.roll(work, shift) for shift in shifts], axis=0)
            cells = np.stack([*energies(rng, load), rng.poisson(20 * copies, n_cells)])
            run += cells
            trace += np.mean([np.roll(cells, -shift, axis=1) for shift in shifts], axis=0)
        of_run.append(by_windows(rng, *run))
        of_trace.append(by_windows(rng, *trace, copies=copies, keep_load=True))
        estimates.append(of_run[-1].estimate)
    truth = np.mean(estimates)
    assert covered(truth, of_run) < 0.75
    assert 0.88 <= covered(truth, of_trace) <= 0.99


def rollouts(workloads):
    """Windows of slack and of max clock on each workload, and the ratio over all of them."""
    plant = Plant(PlantSettings.of("decode", drain=True))
    own, top = (
        [
            run.windows
            for run in rollout(
                resolve_policy(name, plant, -1),
                plant,
                workloads,
                time_probe=False,
                keep_steps=False,
                keep_windows=True,
            )
        ]
        for name in ("slack", "max")
    )
    truth = np.sum([one.energy_j for one in own]) / np.sum([one.energy_j for one in top])
    return own, top, truth


@pytest.mark.slow
@pytest.mark.parametrize("swing_s", [None, 120.0])
def test_half_hours_of_real_rollouts_are_covered(swing_s):
    """Bursty arrivals as generated, and thinned by a swinging rate."""
    rng = np.random.default_rng(9)

    def half_hour(seed):
        made = generate("gamma-sharegpt-like", rate_rps=8.0, duration_s=1800.0, seed=seed)
        if swing_s is None:
            return made
        level = swinging(rng, 180, 1, swing_s)[0] / 2.0
        cell = np.minimum((made.arrival_s / CELL_S).astype(int), 179)
        kept = rng.random(len(made)) < level[cell]
        columns = (made.arrival_s[kept], made.prompt_tokens[kept], made.output_tokens[kept])
        return Trace("swinging", *columns, "made", duration_s=1800.0)

    own, top, truth = rollouts([half_hour(seed) for seed in range(60)])
    found = []
    for a, b in zip(own, top, strict=True):
        weights = window_weights(15, rng, 500, series=[a.energy_j / b.energy_j], load=a.n_counted)
        found.append(ratio_interval(a.energy_j, b.energy_j, weights))
    assert covered(truth, found) >= 0.86  # fewer than 52 of 60: a chance of 1 % at 95 %


@pytest.mark.slow
def test_workloads_whose_level_lasts_longer_than_they_do_are_covered_as_clusters():
    """azure-conv-like keeps a level for longer than a quarter of an hour.

    A workload alone cannot know of other levels; five of them, taken whole, can.
    """
    rng = np.random.default_rng(10)
    workloads = [
        generate("azure-conv-like", rate_rps=6.0, duration_s=900.0, seed=seed)
        for seed in range(120)
    ]
    own, top, truth = rollouts(workloads)
    found = []
    for first in range(0, 120, 5):
        a, b = (
            np.concatenate([one.energy_j for one in side[first : first + 5]]) for side in (own, top)
        )
        weights = window_weights(a.size, rng, 500, days=np.repeat(np.arange(5), a.size // 5))
        found.append(ratio_interval(a, b, weights))
    assert covered(truth, found) >= 0.83  # fewer than 20 of 24: a chance of 1 % at 95 %
