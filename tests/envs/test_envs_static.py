"""Whole runs at one clock and the capacity search."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as some

from biscale_env.config import load_slo
from biscale_env.config.loader import configs_dir
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.loads.capacity import (
    attainment_at,
    find_capacity,
    profile_capacity,
    run_static,
    slowest_alone_s,
)
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.models import physics
from biscale_env.traces import Trace, generate

PHASES = ("prefill", "decode")


def sample(phase: str, n: int = 400, rate: float = 4.0, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(1 / rate, n))
    prompt, output = rng.integers(50, 3000, n), rng.integers(2, 60 if phase == "decode" else 3, n)
    return Trace("sample", arrival, prompt, output, "test", duration_s=float(arrival[-1]) + 1.0)


def by_batch(plant: Plant, trace: Trace, freq_mhz: float) -> Batch:
    """The same run through the environment's batch, one decision at a time, from the first request
    on at its clock.
    """
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]), record=True)
    zero = np.zeros(1, dtype=np.int64)
    batch.reset(zero, zero, zero - 1)
    batch.params["drain"] = 1
    action = plant.clocks.to_action([freq_mhz])
    while not batch.done[0]:
        batch.step(action)
    return batch


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("freq_mhz", [510.0, 1200.0, 1980.0])
def test_equals_the_environment_at_that_clock(phase: str, freq_mhz: float) -> None:
    """Without delay the two differ by nothing.

    Only the idling before the first request is at another clock.
    """
    plant, trace = Plant(PlantSettings.of(phase, actuation_delay_s=0.0)), sample(phase)
    batch, run = by_batch(plant, trace, freq_mhz), run_static(plant, trace, freq_mhz)
    pool = batch.pool
    latency = (batch.finish_s - pool.arrival_s) / (1 if phase == "prefill" else pool.output - 1)
    np.testing.assert_allclose(run.latency_s, latency, rtol=1e-9)
    st, c = batch.states[0], plant.model.member(-1)
    idle_w = [c.n_gpus * physics.idle_power_w(c, f) for f in (1.98, freq_mhz / 1e3)]
    assert run.energy_j == pytest.approx(
        st["energy_j"] - (idle_w[0] - idle_w[1]) * pool.arrival_s[0], rel=1e-9
    )
    assert (run.iterations, run.output_tokens) == (st["iterations"], pool.output.sum())
    assert run.busy_s == pytest.approx(st["busy_s"], rel=1e-9)
    assert run.duration_s == pytest.approx(st["time_s"], rel=1e-12)
    assert run.duration_s >= trace.duration_s


@pytest.mark.parametrize("phase", PHASES)
def test_idle_before_the_first_request_is_at_the_static_clock(phase: str) -> None:
    """A lone request at 100 s: 100 s of idling at 510 MHz, none at the highest clock."""
    plant = Plant(PlantSettings.of(phase))
    trace = Trace(
        "late", np.array([100.0]), np.array([10]), np.array([2]), "test", duration_s=100.0
    )
    run, c = run_static(plant, trace, 510.0), plant.model.member(-1)
    idle_j = 100.0 * c.n_gpus * physics.idle_power_w(c, 0.51)
    busy_j = run.energy_j - idle_j
    assert 0 < busy_j < run.busy_s * c.n_gpus * 700.0


@pytest.mark.parametrize("phase", PHASES)
def test_impossible_clock(phase: str) -> None:
    plant = Plant(PlantSettings.of(phase))
    for freq_mhz in (0.0, 505.0, 1981.0, float("nan")):
        with pytest.raises(BiscaleError, match="impossible"):
            run_static(plant, sample(phase, 5), freq_mhz)


@pytest.mark.parametrize("phase", PHASES)
def test_every_request_has_a_latency_for_every_member(phase: str) -> None:
    plant, trace = Plant(PlantSettings.of(phase)), sample(phase, 100)
    energies = set()
    for member in (-1, 0, 1, plant.model.n_members - 1):
        run = run_static(plant, trace, 1200.0, member)
        assert np.isfinite(run.latency_s).all()
        assert (run.latency_s > 0).all()
        energies.add(round(run.energy_j, 6))
    assert len(energies) > 1


@pytest.fixture(scope="module", params=PHASES)
def searched(request: Any) -> tuple[Plant, Trace, Any]:
    phase = request.param
    plant = Plant(PlantSettings.of(phase))
    trace = generate("azure-conv-like", rate_rps=5.0, duration_s=400.0, seed=1)
    return plant, trace, find_capacity(plant, trace)


def test_found_capacity_meets_the_target_and_more_does_not(
    searched: tuple[Plant, Trace, Any],
) -> None:
    plant, trace, found = searched
    target = plant.slo.attainment
    assert found.rate_rps > 0
    assert found.attainment >= target
    assert attainment_at(plant, trace, found.rate_rps, 1980.0, (0, 1, 2), -1) == found.attainment
    assert attainment_at(plant, trace, 1.05 * found.rate_rps, 1980.0, (0, 1, 2), -1) < target
    rates = [r for r, a in found.tried if a < target]
    assert min(rates) <= 1.0101 * found.rate_rps, "the search stopped before its tolerance"


@pytest.mark.parametrize(
    ("phase", "too_much"), [("prefill", 1.5), ("decode", 1.1)]
)  # decode breaks down suddenly
def test_fresh_workloads_of_a_profile_hold_the_slo_up_to_its_capacity_and_not_beyond(
    phase: str, too_much: float
) -> None:
    """A load is a share of what workloads made at that rate can bear, as evaluation makes them.

    Not of shifted copies.
    """
    plant = Plant(PlantSettings.of(phase, drain=True))
    rate = profile_capacity(plant, "azure-conv-like").rate_rps

    def attained(share: float) -> float:
        made = [generate("azure-conv-like", share * rate, 900.0, seed) for seed in range(100, 116)]
        fresh = [trace.scaled_to(share * rate, seed) for seed, trace in enumerate(made)]
        return plant.slo.attained(
            np.concatenate([run_static(plant, w, 1980.0).latency_s for w in fresh]), phase
        )

    assert attained(0.7) >= plant.slo.attainment
    assert attained(0.95) >= plant.slo.attainment - 0.005
    assert attained(too_much) < plant.slo.attainment - 0.005


def test_capacity_rises_with_clock_and_slo(searched: tuple[Plant, Trace, Any]) -> None:
    plant, trace, found = searched
    slower = [find_capacity(plant, trace, f).rate_rps for f in (810.0, 1395.0)]
    assert slower[0] <= 1.02 * slower[1]
    assert slower[1] <= 1.02 * found.rate_rps
    wide = load_slo().model_copy(update={"name": "wide", "ttft_s": 2.0, "tpot_s": 0.2})
    assert find_capacity(Plant(plant.settings, wide), trace).rate_rps >= 0.98 * found.rate_rps


def test_capacity_of_an_impossible_slo_is_zero() -> None:
    slo = load_slo().model_copy(update={"ttft_s": 1e-4})
    found = find_capacity(Plant(PlantSettings.of("prefill"), slo), sample("prefill"))
    assert (found.rate_rps, found.attainment) == (0.0, 0.0)
    assert all(a < slo.attainment for _, a in found.tried)


def test_capacity_needs_enough_requests() -> None:
    with pytest.raises(BiscaleError, match="at least 100"):
        find_capacity(Plant(PlantSettings.of("prefill")), sample("prefill", 99))


@hypothesis(max_examples=30, deadline=None)
@given(some.floats(0.05, 1.0), some.integers(0, 1000))
def test_lower_loads_only_choose_requests(share: float, seed: int) -> None:
    """Every request of a lower load is one of the trace's, at its own time.

    None is moved, stretched or invented.
    """
    trace = sample("decode")
    scaled = trace.scaled_to(share * trace.rate_rps, seed)
    rows = set(
        zip(
            trace.arrival_s.tolist(),
            trace.prompt_tokens.tolist(),
            trace.output_tokens.tolist(),
            strict=True,
        )
    )
    chosen = list(
        zip(
            scaled.arrival_s.tolist(),
            scaled.prompt_tokens.tolist(),
            scaled.output_tokens.tolist(),
            strict=True,
        )
    )
    assert set(chosen) <= rows
    assert len(set(chosen)) == len(chosen)
    assert scaled.duration_s == trace.duration_s
    deviation = np.sqrt(len(trace) * share * (1 - share)) + 1e-9
    assert abs(len(scaled) - share * len(trace)) <= 5 * deviation + 1


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_slowest_alone_is_the_closed_form_of_the_longest_request(phase):
    plant = Plant(PlantSettings.of(phase, token_budget=1000, drain=True))
    trace = Trace("t", np.zeros(3), np.array([500, 2500, 100]), np.array([2, 2, 2]), "made")
    if phase == "prefill":
        chunks = [(1000, 1000 * 500), (1000, 1000 * 1500), (500, 500 * 2250)]
        expected = sum(float(plant.model.latency_s(n, a, 0, 1, 1980.0)) for n, a in chunks)
    else:
        expected = float(plant.model.latency_s(1, 0, 2500, 1, 1980.0))
    assert slowest_alone_s(plant, trace) == pytest.approx(expected, rel=1e-3)


FAMILIES = sorted(
    f"{gpu.name}/{llm.name}"
    for gpu in (configs_dir() / "models").iterdir()
    if gpu.is_dir() and gpu.name != "profiles"
    for llm in gpu.iterdir()
)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_shipped_llm_serves_a_crowd_and_its_requests_sum_up(family: str, phase: str) -> None:
    """300 requests at once: full batches and caches, where a formula may leave its numbers."""
    gpu, llm = family.split("/")
    file = sorted((configs_dir() / "models" / family).glob(f"{phase}-*.yaml"))[0]
    _, dtype, tp = file.stem.split("-")[:3]
    plant = Plant(PlantSettings.of(phase, gpu=gpu, llm=llm, dtype=dtype, tp=int(tp[2:])))
    crowd = sample(phase, n=300, rate=1e4)
    for freq_mhz in (plant.clocks.freq_min_mhz, plant.clocks.freq_max_mhz):
        run = run_static(plant, crowd, freq_mhz)
        assert run.latency_s.min() > 0.0
        assert run.latency_s.max() < 600.0
        assert run.energy_j < run.duration_s * plant.settings.tp * 2500.0
    if phase == "decode":
        assert run.iterations >= crowd.output_tokens.max() - 1


def test_a_model_that_gives_no_numbers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    plant = Plant(PlantSettings.of("decode"))
    broken = plant.model.member(-1)._replace(e_flop_j=float("nan"))
    monkeypatch.setattr(type(plant.model), "member", lambda model, k: broken)
    with pytest.raises(BiscaleError, match="not finite: check its coefficients"):
        run_static(plant, sample("decode"), 1980.0)
