"""A batch of instances: its copies, and where observers write."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from biscale_env.contract import DECODE_SPEC, HORIZON, PREFILL_SPEC
from biscale_env.core.errors import BiscaleError
from biscale_env.envs import observe
from biscale_env.envs.batch import Batch, RequestTable, calls
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.sim.state import RATE_WINDOWS_S
from biscale_env.traces import generate

PHASES = ["prefill", "decode"]


def started(phase: str, n: int = 3, record: bool = False) -> Batch:
    """A batch in the middle of its episodes."""
    plant = Plant(PlantSettings.of(phase))
    traces = [generate("azure-conv-like", rate_rps=4.0, duration_s=20.0, seed=k) for k in range(n)]
    batch = Batch(plant, n, RequestTable.of(plant, traces), record=record)
    rows = np.arange(n)
    batch.reset(rows, rows, np.full(n, -1))
    for k in range(20):
        batch.step(np.full(n, np.sin(k), dtype=np.float32))
    return batch


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
@pytest.mark.parametrize("phase", PHASES)
def test_a_copy_goes_on_alone_and_alike(phase: str, copied: Any) -> None:
    batch = started(phase)
    twin = copied(batch)
    before = batch.states.copy()
    twin.step(np.zeros(3, dtype=np.float32))
    np.testing.assert_array_equal(batch.states, before)
    batch.step(np.zeros(3, dtype=np.float32))
    for _ in range(30):
        actions = np.array([-1.0, 0.3, 1.0], dtype=np.float32)
        batch.step(actions)
        twin.step(actions)
        np.testing.assert_array_equal(batch.states, twin.states)
        np.testing.assert_array_equal(batch.obs, twin.obs)
        np.testing.assert_array_equal(batch.reward, twin.reward)


@pytest.mark.parametrize("phase", PHASES)
def test_other_types_of_arrays_are_brought_into_the_kernels_types(phase: str) -> None:
    """Machine code is called without a look at types: what does not fit must not reach it."""
    batch = started(phase)
    p = batch.pool
    strange = RequestTable(
        np.repeat(p.arrival_s, 2)[::2], p.prompt.astype(np.int64), p.output.astype(float),
        p.cumulative.astype(np.int32), p.begins, p.ends, p.durations_s,
    )  # fmt: skip
    other = Batch(batch.plant, 3, strange)
    same = Batch(batch.plant, 3, p)
    for b, dtype in ((other, np.int32), (same, np.int64)):
        rows = np.arange(3, dtype=dtype)
        b.reset(rows, rows, np.full(3, -1))
        for k in range(25):
            b.step(np.full(3, np.sin(k)))  # float64
    np.testing.assert_array_equal(other.states, same.states)
    np.testing.assert_array_equal(other.obs, same.obs)


def test_compiled_calls_are_looked_up_once() -> None:
    assert calls("decode") is calls("decode")
    assert calls("decode")[0] is not calls("prefill")[0]


@pytest.mark.parametrize("phase", PHASES)
def test_every_index_of_the_observation_is_written_once(phase: str) -> None:
    """The observers' indices are those of the specification, all of them, no other."""
    spec = PREFILL_SPEC if phase == "prefill" else DECODE_SPEC
    parts = (
        (observe.P, observe.P_RATES, observe.P_CLOCK)
        if phase == "prefill"
        else (observe.D, observe.D_RATES, observe.D_CLOCK)
    )
    written: list[int] = []
    for part in parts:
        for name, index in zip(part._fields, part, strict=True):
            projected = f"{name}_0" in {f.name for f in spec.features}
            written += range(index, index + (HORIZON if projected else 1))
            assert spec.features[index].name == (f"{name}_0" if projected else name)
    assert sorted(written) == list(range(spec.dim))
    names = [f"arrival_rate_{w:g}s" for w in RATE_WINDOWS_S]
    assert list(observe.RateIndices._fields[: len(names)]) == names


@pytest.mark.parametrize("phase", PHASES)
def test_recorded_times_are_those_of_the_requests(phase: str) -> None:
    batch = started(phase, n=1, record=True)
    while not batch.done[0]:
        batch.step(np.zeros(1, dtype=np.float32))
    assert batch.times.finish_s is batch.finish_s
    done = np.isfinite(batch.finish_s)
    assert done.sum() == batch.states["finished"][0]
    assert (batch.finish_s[done] > batch.pool.arrival_s[done]).all()
    assert (np.isfinite(batch.start_s).any()) == (phase == "decode")
    started_too = np.isfinite(batch.start_s[done]).all()
    assert started_too == (phase == "decode")


def test_only_as_many_requests_at_once_as_the_batch_has_room_for() -> None:
    batch = started("decode")
    rows = np.arange(3)
    most = batch.plant.settings.max_seqs
    nominal = np.full(3, -1)
    batch.reset(rows, rows, nominal, {"max_seqs": np.full(3, float(most))})
    assert batch.params["max_seqs"].tolist() == [most] * 3
    batch.reset(rows, rows, nominal, {"delay_s": np.full(3, most + 1.0)})
    assert batch.params["delay_s"].tolist() == [most + 1.0] * 3
    with pytest.raises(BiscaleError, match=f"above the {most} of the settings"):
        batch.reset(rows, rows, nominal, {"max_seqs": np.array([1.0, most + 1.0, 1.0])})
    with pytest.raises(BiscaleError, match=r"unknown engine parameter 'delay'; known: .*delay_s"):
        batch.reset(rows, rows, nominal, {"delay": np.zeros(3)})


@pytest.mark.parametrize("interval_s", [0.0, 0.5])
@pytest.mark.parametrize("phase", PHASES)
def test_steps_add_up_to_the_episode(phase: str, interval_s: float) -> None:
    """What a step counts begins at zero: the sums over the steps are the totals of the record."""
    plant = Plant(PlantSettings.of(phase, min_decision_interval_s=interval_s))
    trace = generate("azure-conv-like", rate_rps=4.0, duration_s=10.0, seed=0)
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]))
    rows = np.zeros(1, dtype=np.int64)
    batch.reset(rows, rows, rows - 1)
    st = batch.states[0]
    parts = {
        "iterations": "step_iterations",
        "finished": "step_finished",
        "busy_s": "step_duration_s",
        "violations": "step_violations",
    }
    energy_j, sums = float(st["energy_j"]), dict.fromkeys(parts, 0.0)
    while not batch.done[0]:
        batch.step(np.full(1, -0.9, dtype=np.float32))
        energy_j += float(st["step_energy_j"])
        for total, step in parts.items():
            sums[total] += float(st[step])
    assert sums == pytest.approx({total: float(st[total]) for total in parts})
    assert energy_j == pytest.approx(float(st["energy_j"]))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_an_episode_runs_on_its_own_coefficients_at_the_clock_of_the_last(phase: str) -> None:
    """The state keeps what a clock makes of any work; another plant makes something else of it."""
    used, fresh = started(phase, n=1), started(phase, n=1)
    top, row, first = np.ones(1, dtype=np.float32), np.zeros(1, dtype=np.int64), np.zeros(1, int)
    used.step(top)
    for batch in (used, fresh):
        batch.reset(row, first, np.array([3]))
        batch.step(top)
    assert used.states["step_energy_j"] == fresh.states["step_energy_j"]
    fresh.reset(row, first, np.array([-1]))
    fresh.step(top)
    assert used.states["step_energy_j"] != fresh.states["step_energy_j"]


@pytest.mark.parametrize("phase", PHASES)
def test_what_is_told_and_counted_is_what_the_records_and_the_table_say(phase: str) -> None:
    """Kernels write infos side by side and keep the tokens of the queue as a running sum."""
    plant, n = Plant(PlantSettings.of(phase, max_seqs=8)), 4  # so that decode has a queue, too
    rate_rps = 8.0 if phase == "prefill" else 60.0
    traces = [
        generate("azure-conv-like", rate_rps=rate_rps, duration_s=6.0, seed=k) for k in range(n)
    ]
    batch = Batch(plant, n, RequestTable.of(plant, traces))
    rows, st, told, waited = np.arange(n), batch.states, batch.told, 0.0
    batch.reset(rows, rows, np.full(n, -1))
    for k in range(400):
        queued = batch.pool.cumulative[st["tail"]] - batch.pool.cumulative[st["head"]]
        np.testing.assert_array_equal(st["queue_tokens"], queued)
        waited = max(waited, float(queued.max()))
        np.testing.assert_array_equal(told.time_s, st["time_s"])
        np.testing.assert_array_equal(told.dt, st["time_s"] - st["step_start_s"])
        np.testing.assert_array_equal(told.energy_j, st["step_energy_j"])
        np.testing.assert_array_equal(told.freq_mhz, st["step_freq_mean_ghz"] * 1e3)
        np.testing.assert_array_equal(told.cost, st["step_violations"])
        np.testing.assert_array_equal(told.done, st["done"])
        batch.step(np.full(n, np.sin(k), dtype=np.float32))
    assert waited > 0
    assert batch.done.any() or phase == "decode"


def test_ensemble_members_get_their_own_records_in_any_order() -> None:
    batch = started("decode")
    rows, members = np.arange(3), np.array([5, -1, 2])
    for order in ([0, 1, 2], [2, 0, 1]):
        batch.reset(rows[order], rows[order], members[order])
        for row, member in zip(rows, members, strict=True):
            assert batch.coefs[row].tolist() == tuple(batch.plant.model.member(int(member)))
            assert batch.params["delay_s"][row] == batch.plant.delay_s(int(member))
