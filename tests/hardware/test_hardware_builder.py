"""The observation of the hardware is the observation of the simulator, index by index."""

import numpy as np
import pytest

from biscale_env.contract import spec_for
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.emulation.simulated import SimulatedWatcher
from biscale_env.hardware.engines.hook import engine_record
from biscale_env.hardware.engines.hook.engine_record import Detail, EngineRecord, Queued, Scheduled
from biscale_env.hardware.loop.builder import ObservationBuilder, rows_of
from biscale_env.hardware.loop.clockview import ClockView
from biscale_env.sim.prefill import form_batch
from biscale_env.traces import Trace

EPOCH_S = 1000.0
ROW = np.zeros(1, dtype=np.int64)


def busy_trace(n, seed, rate, output, prompt=6000):
    rng = np.random.default_rng(seed)
    return Trace(
        "t",
        np.cumsum(rng.exponential(1 / rate, n)),
        rng.integers(1, prompt, n).astype(np.int32),
        rng.integers(2, output, n).astype(np.int32),
        "test",
    )


class SmallPlant(Plant):
    """A decode instance with little memory."""

    @property
    def kv_capacity_tokens(self):
        return 30_000


def mirror(plant, trace, actions):
    """Run the simulator; at every decision give its own observation and the built one."""
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]), record=True)
    members = np.array([-1])
    batch.reset(ROW, ROW, members)
    st, pool = batch.states[0], batch.pool
    watcher = SimulatedWatcher("sim", EPOCH_S)
    builder = ObservationBuilder(plant, plant.delay_s(-1))
    view = ClockView(plant.clocks, plant.delay_s(-1))
    for action in actions:
        if batch.done[0]:
            break
        if plant.phase == "prefill":
            tokens, _, n_seq, _, _ = form_batch(
                pool.prompt,
                pool.prefix,
                int(st["head"]),
                int(st["head_done"]),
                int(st["tail"]),
                plant.settings.token_budget,
                plant.settings.max_seqs,
            )
            record = watcher.prefill(st, pool.arrival_s, pool.prompt, int(tokens), int(n_seq))
        else:
            record = watcher.decode(
                st,
                pool.arrival_s,
                pool.prompt,
                batch.running.slots[0],
                batch.running.tree[0],
                batch.running.stack[0],
                int(batch.params[0]["kv_capacity"]),
            )
        record = engine_record.decode(engine_record.encode(record))
        yield batch.obs[0].copy(), builder.observe(record, view, float(st["last_power_w"])), record
        view.request(
            float(plant.clocks.snap_mhz(plant.clocks.to_freq_mhz(action))),
            EPOCH_S + float(st["time_s"]),
        )
        batch.step(np.array([action], dtype=np.float32))


def check_equal(plant, pairs, at_least):
    spec, compared = spec_for(plant.phase), 0
    moved = np.zeros(spec.dim, dtype=bool)
    first = None
    for simulated, built, _ in pairs:
        wrong = np.flatnonzero(~np.isclose(simulated, built, rtol=2e-6, atol=2e-6))
        assert not wrong.size, [(spec.features[i].name, simulated[i], built[i]) for i in wrong]
        first = simulated if first is None else first
        moved |= simulated != first
        compared += 1
    assert compared >= at_least
    return {spec.features[i].name for i in np.flatnonzero(~moved)}


@pytest.mark.parametrize("seed", [0, 1])
def test_prefill_index_by_index(seed):
    plant = Plant(
        PlantSettings.of("prefill", drain=True, actuation_delay_s=0.3)
    )  # longer than a batch: requests queue up
    actions = np.random.default_rng(seed).uniform(-1, 1, 400)
    still = check_equal(plant, mirror(plant, busy_trace(250, seed, 4.0, 50), actions), 200)
    assert still <= {"slo", "actuation_delay", "kv_backpressure"}  # every other index was exercised


@pytest.mark.parametrize(("seed", "kind"), [(0, Plant), (1, SmallPlant)])
def test_decode_index_by_index_with_and_without_preemption(seed, kind):
    plant = kind(PlantSettings.of("decode", drain=True))
    actions = np.random.default_rng(seed).uniform(-1, 1, 3000)
    preempted = 0

    def counted():
        nonlocal preempted
        for simulated, built, record in mirror(
            plant,
            busy_trace(120, seed, 20.0, 700, 400)
            if kind is SmallPlant
            else busy_trace(120, seed, 6.0, 200),
            actions,
        ):
            preempted += len(record.detail.preempted) > 0
            yield simulated, built, record

    still = check_equal(plant, counted(), 500)
    allowed = {"slo", "actuation_delay", "incoming_requests"}
    if kind is SmallPlant:
        assert preempted > 10
        assert still <= allowed
    else:
        assert still <= allowed | {
            "recompute_tokens",
            "waiting_requests",
            "waiting_tokens",
            "oldest_wait",
        }


def test_records_pass_for_plain_forward_pass_metrics():
    """A reader that knows the published schema only sees what that schema means."""
    import msgspec

    class Plain(msgspec.Struct):
        version: int = 1
        worker_id: str = ""
        dp_rank: int = 0
        counter_id: int = 0
        wall_time: float = 0.0
        scheduled_requests: dict = {}
        queued_requests: dict = {}

    record = EngineRecord(
        worker_id="w",
        counter_id=7,
        wall_time=0.1,
        scheduled_requests=Scheduled(2, 300),
        detail=Detail(1.0, 0.0),
    )
    plain = msgspec.msgpack.decode(engine_record.encode(record), type=Plain)
    assert (plain.worker_id, plain.counter_id, plain.scheduled_requests["sum_prefill_tokens"]) == (
        "w",
        7,
        300,
    )


def test_another_schema_version_is_refused():
    with pytest.raises(ValueError, match="version 2"):
        engine_record.decode(engine_record.encode(EngineRecord(version=2)))
    with pytest.raises(ValueError, match="not an engine record"):
        engine_record.decode(b"\x00\x01")


def test_a_broken_table_is_refused():
    with pytest.raises(BiscaleError, match="different versions"):
        rows_of(np.zeros(4).tobytes(), 3)
    view = ClockView(Plant(PlantSettings.of("prefill")).clocks, 0.05)
    for phase, detail in (
        ("prefill", Detail(1.0, 0.0, waiting=np.full(3, np.nan).tobytes())),
        (
            "decode",
            Detail(
                1.0,
                0.0,
                running_start=np.full(1, np.inf).tobytes(),
                running_tokens=np.ones(1).tobytes(),
            ),
        ),
        (
            "decode",
            Detail(
                1.0, 0.0, running_start=np.ones(2).tobytes(), running_tokens=np.ones(1).tobytes()
            ),
        ),
    ):
        builder = ObservationBuilder(Plant(PlantSettings.of(phase)), 0.05)
        with pytest.raises(BiscaleError, match="different versions"):
            builder.observe(EngineRecord(detail=detail), view, 0.0)


def prefill_detail(time_s, rows, arrived=0, recent=(), epoch=EPOCH_S, more=0):
    return Detail(
        time_s,
        epoch,
        np.array(rows, dtype=float).tobytes(),
        more,
        arrived=arrived,
        arrived_tokens=100 * arrived,
        recent=np.array(recent, dtype=float).tobytes(),
    )


def test_lost_records_do_not_lose_arrivals():
    """Two records with ten arrivals between them, or one record that tells of ten.

    The same total reaches the rate.
    """
    plant = Plant(PlantSettings.of("prefill"))
    builder, view = ObservationBuilder(plant, 0.05), ClockView(plant.clocks, 0.05)
    value = plant.spec.value
    builder.observe(EngineRecord(detail=prefill_detail(EPOCH_S + 100.0, [])), view, 0.0)
    obs = builder.observe(
        EngineRecord(detail=prefill_detail(EPOCH_S + 100.5, [], arrived=10)), view, 0.0
    )
    assert value(obs, "arrival_rate_10s") == pytest.approx(10 / 10.0, rel=1e-3)
    assert value(obs, "token_rate_10s") == pytest.approx(100.0, rel=1e-3)


def test_a_restarted_engine_starts_from_scratch():
    plant = Plant(PlantSettings.of("prefill"))
    builder, view = ObservationBuilder(plant, 0.05), ClockView(plant.clocks, 0.05)
    builder.observe(EngineRecord(detail=prefill_detail(EPOCH_S + 100.0, [], arrived=50)), view, 0.0)
    obs = builder.observe(
        EngineRecord(detail=prefill_detail(EPOCH_S + 200.0, [], arrived=0, epoch=EPOCH_S + 150)),
        view,
        0.0,
    )
    assert plant.spec.value(obs, "arrival_rate_60s") == 0.0


def test_a_queue_longer_than_its_rows_is_completed_by_the_mean():
    plant = Plant(PlantSettings.of("prefill"))
    builder, view = ObservationBuilder(plant, 0.05), ClockView(plant.clocks, 0.05)
    rows = [[EPOCH_S + 1, 100, 0], [EPOCH_S + 2, 300, 0]]
    obs = builder.observe(
        EngineRecord(detail=prefill_detail(EPOCH_S + 3.0, rows, more=3000)), view, 0.0
    )
    assert plant.spec.value(obs, "queue_requests") == pytest.approx(3002)
    assert plant.spec.value(obs, "queue_tokens") == pytest.approx(400 + 3000 * 200)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_plain_metrics_are_completed_by_estimates(phase):
    """Without detail: counts, sums and batch sizes are right."""
    plant = Plant(PlantSettings.of(phase))
    builder, view = ObservationBuilder(plant, 0.05), ClockView(plant.clocks, 0.05)
    if phase == "prefill":
        record = EngineRecord(
            scheduled_requests=Scheduled(2, 2000), queued_requests=Queued(3, 3000)
        )
        obs = builder.observe(record, view, 350.0)
        assert plant.spec.value(obs, "queue_requests") == pytest.approx(5)
        assert plant.spec.value(obs, "queue_tokens") == pytest.approx(5000)
        assert plant.spec.horizon(obs, "batch_tokens")[0] == 2048
    else:
        record = EngineRecord(
            scheduled_requests=Scheduled(num_decode_requests=4, sum_decode_kv_tokens=4000),
            queued_requests=Queued(1, 1000),
        )
        for _ in range(3):
            obs = builder.observe(record, view, 350.0)
        assert plant.spec.value(obs, "batch") == pytest.approx(4)
        assert plant.spec.value(obs, "cached_tokens") == pytest.approx(4000)
        assert plant.spec.value(obs, "waiting_requests") == pytest.approx(1)
        assert plant.spec.value(obs, "tpot_slack_min") == pytest.approx(
            2.0, abs=0.05
        )  # three tokens: two intervals gained
    assert plant.spec.value(obs, "last_power") == pytest.approx(350.0)


def test_the_clock_view_follows_the_actuator():
    plant = Plant(PlantSettings.of("prefill"))
    view = ClockView(plant.clocks, 0.05)
    view.request(1200.0, 10.0)
    view.request(900.0, 10.01)
    view.settle(10.06)
    assert (view.freq_mhz, view.inflight_mhz, view.requested_mhz, view.apply_at_s) == (
        1200.0,
        900.0,
        900.0,
        pytest.approx(10.10),
    )
    from biscale_env.hardware.loop.wire import ClockChange

    view.hear(
        ClockChange("prefill", "command", 2, 900.0, 900.0, 10.0, 10.0, 10.0, seen_s=10.07)
    )  # sooner than expected
    assert (view.freq_mhz, view.apply_at_s) == (900.0, np.inf)
    view.hear(ClockChange("prefill", "lease", -1, 0.0, 0.0, np.nan, 10.2, 10.2))
    assert view.freq_mhz == view.requested_mhz == 1980.0
