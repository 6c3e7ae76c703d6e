"""From a running engine to a corrected model: recorded, explored, tabled, fitted."""

import json
import threading
import time

import msgspec
import numpy as np
import pandas as pd
import pytest
import yaml
from hardware_helpers import gpus_of, spawn

from biscale_env.config import InstanceSpec, load_gpu
from biscale_env.contract import ClockRange
from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks.fake_gpus import create_state
from biscale_env.hardware.emulation.emulate import all_records_endpoint
from biscale_env.hardware.engines.hook.engine_record import Detail, EngineRecord, Scheduled
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.hardware.observe.exploring import HOLD, LEVELS, Exploring
from biscale_env.hardware.observe.run_iterations import STEADY, clock_of, observed_iterations
from biscale_env.hardware.observe.run_observer import observe, settings_of
from biscale_env.hardware.replay.raw_log import Raw, read_raw
from biscale_env.hardware.replay.recorder import IterationRow
from biscale_env.models import physics
from biscale_env.models.coefficient_files import stem
from biscale_env.models.fit.run_fit import (
    ObservedIterations,
    fit_run,
    held_out_minutes,
)
from biscale_env.models.iteration_model import load_model, read_model

pytest_plugins = ["hardware_fixtures"]
BASE = "h100-sxm/llama-3.3-70b"


def seen_by(phase, truth, clocks_mhz, n=600, noise=0.01, seed=0):
    """Iterations of ``n`` batches over ten minutes, as a machine with these coefficients does."""
    rng = np.random.default_rng(seed)
    freq_mhz = rng.choice(clocks_mhz, n).astype(float)
    if phase == "decode":
        batch, context = rng.integers(1, 128, n).astype(float), rng.uniform(200, 3000, n)
        work = (batch, np.zeros(n), batch * context, batch)
        columns = {"batch": batch, "new_tokens": 0.0, "prefix": 0.0, "context": context}
    else:
        batch, new = rng.integers(1, 8, n).astype(float), rng.uniform(60, 600, n)
        work = (batch * new, batch * new * new / 2, np.zeros(n), batch)
        columns = {"batch": batch, "new_tokens": new, "prefix": 0.0, "context": 0.0}
    took = physics.latency_s(truth, *work, freq_mhz * 1e-3) * rng.normal(1.0, noise, n)
    table = pd.DataFrame({**columns, "latency_s": took, "freq_mhz": freq_mhz})
    return ObservedIterations(phase, np.linspace(0.0, 600.0, n), table, 0)


def slower(phase):
    """A machine whose engine and memory are slower than the shipped model says."""
    start = load_model(phase, 4, "bf16", BASE).coefficients
    return start._replace(
        host0_s=4.0 * start.host0_s,
        host_s_per_seq=2.0 * start.host_s_per_seq,
        attn_decode_s=1.6 * start.attn_decode_s,
    )


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_engine_terms_are_corrected_on_minutes_that_the_fit_did_not_see(phase):
    fitted = fit_run(seen_by(phase, slower(phase), [1200.0]), BASE, 4, "bf16", name="mine")
    assert fitted.before_mape > 0.05
    assert fitted.fit.latency_mape < 0.012  # the noise of 1 % has a mean of 0.8 %
    assert any("seen: 1200 MHz" in text for text in fitted.borrowed)
    assert fitted.fit.content.fit["held_out_mape_before"] > fitted.fit.content.fit["held_out_mape"]
    moved = {n for n, c in fitted.fit.content.coefficients.items() if "mine" in c.source}
    assert "host0_s" in moved
    assert not moved & {"core_share", "stream_knee_ghz", "weights_s", "e_flop_j"}


def test_the_corrected_files_are_read_like_any_model(tmp_path):
    seen = seen_by("decode", slower("decode"), [1395.0])
    fitted = fit_run(seen, BASE, 4, "bf16", name="mine")
    path = tmp_path / f"{stem('decode', 'bf16', 4, 1)}.yaml"
    for name, text in fitted.fit.files(path).items():
        (tmp_path / name).write_text(text)
    model = read_model("decode", 4, "bf16", str(tmp_path))
    work = (64.0, 0.0, 64_000.0, 64.0)
    wanted_s = float(physics.latency_s(slower("decode"), *work, 1.395))
    assert float(model.latency_s(*work, 1395.0)) == pytest.approx(wanted_s, rel=0.01)
    assert model.n_members > 8
    spread = [float(model.latency_s(*work, 1395.0, member=k)) for k in range(model.n_members)]
    assert np.std(spread) / wanted_s < 0.01


def test_three_clocks_or_more_correct_the_axis_and_fewer_do_not():
    start = load_model("decode", 4, "bf16", BASE).coefficients
    truth = start._replace(stream_knee_ghz=1.5 * start.stream_knee_ghz)
    seen = seen_by("decode", truth, [810.0, 1005.0, 1395.0, 1980.0])
    fitted = fit_run(seen, BASE, 4, "bf16", name="mine")
    assert not any("clock" in text for text in fitted.borrowed)
    assert fitted.fit.latency_mape < 0.5 * fitted.before_mape
    known = fitted.fit.content.coefficients["stream_knee_ghz"].value
    assert known == pytest.approx(truth.stream_knee_ghz, rel=0.1)


def test_too_little_is_refused_with_what_helps():
    seen = seen_by("decode", slower("decode"), [1200.0], n=50)
    with pytest.raises(BiscaleError, match=r"50 usable iterations.*observe for longer"):
        fit_run(seen, BASE, 4, "bf16")


def test_whole_minutes_are_held_out():
    minute = np.arange(0.0, 600.0, 0.5)
    held = held_out_minutes(minute)
    assert held.mean() == pytest.approx(1 / 3, abs=0.05)
    assert np.array_equal(np.unique(minute[held] // 60), [1, 4, 7])
    short = np.linspace(0.0, 30.0, 300)
    assert 0.2 < held_out_minutes(short).mean() < 0.4
    assert np.abs(np.diff(held_out_minutes(short).astype(int))).sum() <= 4  # blocks, not rows


def row(counter, time_s, wall_s, **work):
    none = {"prefill_requests": 0, "prefill_tokens": 0, "prefill_kv_tokens": 0}
    none |= {"decode_requests": 0, "decode_kv_tokens": 0, "queued_requests": 0, "kv_use": 0.0}
    return IterationRow("decode", counter, time_s, time_s, wall_s, **{**none, **work})


def raw_of(rows, freq_mhz, times):
    telemetry = pd.DataFrame(
        {"time_s": times, "group": "decode", "gpu": "a", "freq_mhz": freq_mhz, "power_w": 1.0}
    )
    facts = {"settings": {"policies": {"decode": "max"}, "instance": {}}, "started_s": 0.0}
    return Raw(facts, [], {"decode": rows}, {"decode": []}, [], telemetry)


def test_iterations_of_one_phase_at_one_clock_are_kept():
    times = np.arange(0.0, 2.0, 0.05)
    freq = np.where(times < 1.0, 1980.0, 1200.0)
    rows = [row(k, 0.1 * k, 0.08, decode_requests=4, decode_kv_tokens=400) for k in range(18)]
    rows[3] = row(3, 0.3, 0.08, decode_requests=4, decode_kv_tokens=400, prefill_tokens=900)
    seen = observed_iterations(raw_of(rows, freq, times), "decode")
    # 0 to 17 but for: 3 (mixes the phases), 9 or 10 (the clock changes), 17 (nobody tells how long)
    assert 13 <= len(seen.table) <= 15
    assert seen.left_out == 18 - len(seen.table)
    assert set(seen.table["freq_mhz"]) == {1980.0, 1200.0}
    assert seen.table["latency_s"].to_numpy() == pytest.approx(0.08)
    assert set(seen.table["context"]) == {100.0}
    with pytest.raises(BiscaleError, match="none of the 18 iterations"):
        observed_iterations(raw_of(rows, np.full(len(times), np.nan), times), "decode")
    with pytest.raises(BiscaleError, match="no iteration of decode"):
        observed_iterations(raw_of([], freq, times), "decode")


def sampled(times, freqs):
    return pd.DataFrame({"time_s": times, "group": "g", "gpu": "a", "freq_mhz": freqs})


def test_a_clock_that_moves_within_an_iteration_or_right_beside_it_is_no_clock():
    telemetry = sampled(np.arange(8.0), np.where(np.arange(8) < 4, 900.0, 1200.0))
    begin = np.array([1.2, 2.2, 3.2, 4.2, 5.2])
    mean, steady = clock_of(telemetry, "g", begin, begin + 0.6)
    assert steady.tolist() == [True, False, False, False, True]
    assert mean[[0, 4]].tolist() == [900.0, 1200.0]


def test_a_clock_that_nobody_sampled_is_no_clock():
    times = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 9.0, 10.0, 11.0, 12.0, 13.0])
    begin = np.array([1.2, 6.0, 11.2])
    _, steady = clock_of(sampled(times, 900.0), "g", begin, begin + 0.6)
    assert steady.tolist() == [True, False, True]
    assert not clock_of(sampled([], []), "g", begin, begin + 0.6)[1].any()
    assert clock_of(sampled([1.0], [900.0]), "g", begin, begin + 0.6)[1].all()


class Asks:
    """A policy that asks for one clock."""

    def __init__(self, clocks, freq_mhz):
        self.clocks, self.freq_mhz = clocks, freq_mhz

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        return self.clocks.to_action(np.full(1, self.freq_mhz)), state


def test_exploring_visits_every_level_and_never_goes_below_what_the_slo_needs():
    clocks = ClockRange.of(load_gpu("h100-sxm"))
    policy = Asks(clocks, 1005.0)
    explorer = Exploring(policy, clocks, seed=1)
    asked = []
    for _ in range(2 * LEVELS * HOLD):
        action, _ = explorer.predict(np.zeros(3, np.float32))
        asked.append(float(clocks.snap_mhz(clocks.to_freq_mhz(action))[0]))
    asked = np.array(asked)
    assert asked.min() >= 1005.0
    allowed = {float(f) for f in explorer.levels_mhz if f >= 1005.0} | {1005.0}
    assert set(asked) == allowed
    assert all(np.ptp(asked[k : k + HOLD]) == 0.0 for k in range(0, len(asked), HOLD))
    policy.freq_mhz = 1980.0  # the SLO needs everything: nothing is explored
    action, _ = explorer.predict(np.zeros(3, np.float32))
    assert float(clocks.to_freq_mhz(action)[0]) == pytest.approx(1980.0)


@pytest.mark.slow
def test_one_of_two_fits_is_asked_for(tmp_path):
    for arguments in (
        ["fit", "--from", str(tmp_path)],
        ["fit", "--from", str(tmp_path), "--out", str(tmp_path / "m"), "--profile", "x.csv"],
        ["fit", "--from", str(tmp_path), "--out", str(tmp_path / "m")],
    ):
        process = spawn(*arguments)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 2
        assert stderr.startswith("biscale: ")


@pytest.mark.slow
def test_an_observation_records_what_an_engine_publishes_and_touches_no_clock(tmp_path):
    """From the address of all records to a table of iterations, without any load of our own."""
    gpus = create_state(tmp_path / "gpus", 8)
    options = {"backend": f"fake:{gpus}", "sockets": tmp_path / "s", "engine": "emulated"}
    settings = settings_of(("decode",), False, gpus={"decode": ("4", "5", "6", "7")}, **options)
    (tmp_path / "s").mkdir(mode=0o700)
    with pytest.raises(BiscaleError, match=r"no record came within 0.3 s: start `biscale hw emul"):
        observe(settings, tmp_path / "none", 0.3)
    sender = Sender(None, all_records_endpoint(tmp_path / "s", "decode"))
    ended = threading.Event()

    def publish():
        for counter in range(1, 100_000):
            now = time.monotonic()
            work = Scheduled(num_decode_requests=4, sum_decode_kv_tokens=400)
            detail = Detail(now, 1.0, cached_tokens=400)
            sender.send(
                EngineRecord(
                    counter_id=counter, wall_time=0.005, scheduled_requests=work, detail=detail
                )
            )
            if ended.wait(0.01):
                return

    engine = threading.Thread(target=publish)
    engine.start()
    try:
        seen = observe(settings, tmp_path / "seen", 2.0)
    finally:
        ended.set()
        engine.join()
        sender.close()
    assert seen.iterations["decode"] > 5
    assert gpus_of(gpus)["locked"].sum() == 0
    raw = read_raw(tmp_path / "seen" / "raw")
    found = observed_iterations(raw, "decode")
    assert found.table["latency_s"].max() <= 0.005
    assert set(found.table["batch"]) == {4.0}
    assert not (tmp_path / "seen" / "raw" / "clocks.jsonl").exists()
    with pytest.raises(BiscaleError, match="holds a run already"):
        observe(settings, tmp_path / "seen", 1.0)
    with pytest.raises(BiscaleError, match="above 0"):
        observe(settings, tmp_path / "other", 0.0)


def relative_errors(seen):
    """How far the shipped decode model is from each observed iteration."""
    table = seen.table
    batch = table["batch"].to_numpy()
    work = (batch, np.zeros(len(table)), batch * table["context"].to_numpy(), batch)
    predicted_s = load_model("decode", 4, "bf16", BASE).latency_s(*work, table["freq_mhz"])
    return np.abs(predicted_s / table["latency_s"].to_numpy() - 1.0)


@pytest.mark.slow
def test_observe_explore_and_fit_on_emulated_engines(tmp_path, hw_state):
    """Under traffic of its own: a silent socket is said, clocks are visited, fitted and reset."""
    from emulated_traffic import traffic_for

    with traffic_for(tmp_path, seconds=75.0) as (backend, sockets, env):
        engine = ["--gpus", "decode=4-7", "--backend", backend, "--engine", "emulated"]
        nobody = ["--sockets", str(tmp_path / "no"), "--duration", "1"]
        silent = spawn("hw", "observe", *engine, *nobody, "--out", str(tmp_path / "none"), env=env)
        _, stderr = silent.communicate(timeout=300)
        assert silent.returncode == 2
        assert "no record came within 1 s" in stderr
        common = [*engine, "--sockets", sockets]
        out = tmp_path / "seen"
        explored = spawn("hw", "explore", *common, "--duration", "40", "--out", str(out), env=env)
        stdout, stderr = explored.communicate(timeout=300)
        assert explored.returncode == 0, stderr
        assert "iterations recorded" in stdout
    fitted = spawn("fit", "--from", str(out), "--out", str(tmp_path / "mine"), env=env)
    stdout, stderr = fitted.communicate(timeout=300)
    assert fitted.returncode == 0, stderr
    assert "before" in stdout
    content = yaml.safe_load(
        (tmp_path / "mine" / f"{stem('decode', 'bf16', 4, 1)}.yaml").read_text()
    )
    # the emulated engine runs on the shipped model: nothing is there to mend, nothing is spoiled.
    # What remains are iterations whose clock moved by less than what counts as standing still.
    off = relative_errors(observed_iterations(read_raw(out / "raw"), "decode"))
    assert np.median(off) < 1e-6
    assert off.max() < STEADY
    assert content["fit"]["held_out_mape_before"] < 1e-3
    assert content["fit"]["held_out_mape"] < 1e-3
    assert len(json.loads(content["fit"]["clocks_mhz"])) >= 3
    InstanceSpec.of(model=str(tmp_path / "mine"))
    assert (
        msgspec.json.decode((out / "raw" / "clocks.jsonl").read_bytes().splitlines()[-1])[
            "freq_mhz"
        ]
        == 0.0
    )
