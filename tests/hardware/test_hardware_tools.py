"""Doctor, clock latency, recorder, GPM, bridge, bench: the tools around the loop."""

import contextlib
import http.server
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hardware_helpers import PythonNvml, gpus_of, read_until, spawn
from toy_hardware import TOY_GPU, toy_spec
from typer.testing import CliRunner

from biscale_env.cli import build
from biscale_env.cli.hw.hw_options import clock_bounds, instance_of, parse_groups
from biscale_env.cli.hw.profile_command import parse_clocks
from biscale_env.config import InstanceSpec, configs_dir, load_gpu
from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks import change_latency, doctor, owner
from biscale_env.hardware.clocks.backend import ClockDenied
from biscale_env.hardware.clocks.change_latency import Switch
from biscale_env.hardware.clocks.fake_gpus import FakeBackend, FakeState, create_state
from biscale_env.hardware.clocks.gpm import Gpm, open_gpm
from biscale_env.hardware.clocks.nvml import NvmlBackend
from biscale_env.hardware.clocks.observe_only import ObserveOnly
from biscale_env.hardware.engines.hook.engine_record import Detail, EngineRecord, Scheduled
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.hardware.loop import wire
from biscale_env.hardware.replay.recorder import EnergyCurve, IterationLog, Telemetry
from biscale_env.models import load_model

pytest_plugins = ["hardware_fixtures"]


@contextlib.contextmanager
def site_that_says(body):
    """A loopback site that answers every path with the same."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def machine(tmp_path, hw_state):
    return create_state(tmp_path / "gpus", 2, delay_s=0.03)


# --- doctor ---------------------------------------------------------------------------------------


def test_doctor_does_not_take_an_emulated_engine_for_vllm():
    body = b"biscale_emulated:engine 1\nvllm:num_requests_running 0\n"
    with site_that_says(body) as url:
        assert "biscale_emulated" in doctor.check_endpoint(url).text


def test_doctor_without_a_driver_says_how_to_go_on(monkeypatch):
    def none(name):
        raise BiscaleError("no NVIDIA driver was found on this machine")

    monkeypatch.setattr(doctor, "open_backend", none)
    (finding,) = doctor.check_clocks("nvml")
    assert finding.status == "fail"
    assert "biscale hw emulate" in finding.text


def test_doctor_lists_gpus_and_changes_nothing(machine):
    findings = doctor.examine(f"fake:{machine}")
    text = "\n".join(f.text for f in findings)
    assert "1980 MHz of 345 to 1980" in text
    assert not [f for f in findings if f.status == "fail"]
    assert all(g["n_sets"] + g["n_resets"] == 0 for g in gpus_of(machine))


def test_doctor_names_throttling_orphans_and_silent_engines(machine):
    with FakeState(machine).locked() as gpus:
        gpus[1]["reasons"] = 0x40
    uuid = FakeBackend(machine).devices()[0].uuid
    owner.write_state(uuid, "fake")
    findings = doctor.examine(f"fake:{machine}", ["http://127.0.0.1:9"])
    said = {f.status: f.text for f in findings if f.subject in (uuid, "http://127.0.0.1:9")}
    assert any("hardware thermal slowdown" in f.text and f.status == "warn" for f in findings)
    assert "biscale hw restore" in said["warn"]
    assert "does not answer" in said["fail"]


def test_doctor_ends_with_the_first_thing_that_fails():
    done = CliRunner().invoke(build(), ["hw", "doctor", "--backend", "fake:/nowhere"])
    assert isinstance(done.exception, BiscaleError)
    assert "hw emulate" in str(done.exception)


def test_doctor_through_nvml_names_the_missing_privilege(monkeypatch):
    PythonNvml().install(monkeypatch)
    monkeypatch.setattr(doctor, "has_sys_admin", lambda: False)
    findings = doctor.check_clocks("nvml")
    (privilege,) = [f for f in findings if f.subject == "privilege"]
    assert privilege.status == "warn"
    assert "sudo" in privilege.text
    assert any("persistence mode is off" in f.text for f in findings)


def test_capability_is_read_from_the_kernel():
    assert doctor.has_sys_admin() in (True, False)
    if os.geteuid() != 0:
        assert not doctor.has_sys_admin()


# --- clock latency --------------------------------------------------------------------------------


def test_latency_finds_the_delay_and_resets(machine, hw_state):
    backend = FakeBackend(machine)
    uuid = backend.devices()[0].uuid
    told = []
    found = change_latency.measure(
        backend,
        "fake",
        uuid,
        [(900.0, 1200.0), (1200.0, 900.0)],
        3,
        settle_s=0.05,
        tell=told.append,
    )
    assert len(found) == len(told) == 6
    summary = change_latency.summarise(found)
    assert summary["seen_median_s"] == pytest.approx(0.03, abs=0.02)
    assert summary["seen_share"] == 1.0
    assert gpus_of(machine)[0]["locked"] == 0
    assert not list(hw_state.glob("*.json"))


def test_latency_that_is_never_seen_is_refused_and_reset(tmp_path, hw_state):
    machine = create_state(tmp_path / "slow", 1, delay_s=60.0)
    backend = FakeBackend(machine)
    with pytest.raises(BiscaleError, match="keep it busy"):
        change_latency.measure(
            backend,
            "fake",
            backend.devices()[0].uuid,
            [(900.0, 1200.0)],
            1,
            timeout_s=0.05,
            settle_s=0.0,
        )
    assert gpus_of(machine)[0]["locked"] == 0


def test_latency_needs_a_backend_that_locks(machine):
    with pytest.raises(BiscaleError, match="observe-only"):
        change_latency.measure(ObserveOnly(FakeBackend(machine)), "fake", "x", [])


def test_pairs_are_ups_and_downs_over_the_range():
    pairs = change_latency.pairs_of([510.0 + 15 * k for k in range(99)], 3)
    assert {a for a, _ in pairs} == {510.0, 1245.0, 1980.0}
    assert len(pairs) == 6
    assert {(b, a) for a, b in pairs} == set(pairs)


def test_measured_delays_reach_the_environments(tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(configs_dir() / "models" / "h100-sxm/llama-3.3-70b", folder)
    switches = [Switch("g", 900, 1200, 0.001, s) for s in (0.08, 0.09, 0.10, math.nan)]
    changed = change_latency.write_delays(folder, switches)
    assert changed == sorted(folder.glob("*-tp*.yaml"))
    model = load_model("decode", 4, name=str(folder))
    assert model.delay_s() == pytest.approx(0.09)
    assert {model.delay_s(k) for k in range(model.n_members)} <= {0.08, 0.09, 0.10}
    assert len({model.delay_s(k) for k in range(model.n_members)}) == 3
    assert model.member(3) == load_model("decode", 4).member(3)  # nothing else has changed
    from biscale_env.envs.plant import Plant, PlantSettings

    assert Plant(PlantSettings.of("decode", model=str(folder))).delay_s(-1) == pytest.approx(0.09)


def test_delays_without_files_or_measurements_are_refused(tmp_path):
    with pytest.raises(BiscaleError, match="no coefficient files"):
        change_latency.write_delays(tmp_path, [Switch("g", 900, 1200, 0.001, 0.1)])
    shutil.copy(
        next((configs_dir() / "models" / "h100-sxm/llama-3.3-70b").glob("decode-bf16-tp4.yaml")),
        tmp_path,
    )
    with pytest.raises(BiscaleError, match="no delay"):
        change_latency.write_delays(tmp_path, [Switch("g", 900, 1200, 0.001, math.nan)])


@pytest.mark.slow
def test_clock_latency_command(machine, tmp_path):
    arguments = [
        "hw",
        "clock-latency",
        "--backend",
        f"fake:{machine}",
        "--clocks",
        "2",
        "--repeats",
        "1",
        "--out",
        str(tmp_path / "l.csv"),
    ]
    done = CliRunner().invoke(build(), arguments)
    assert done.exit_code == 0, done.output
    assert len(pd.read_csv(tmp_path / "l.csv")) == 2
    assert "--delay 0.03" in done.output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_clock_latency_cut_off_gives_the_clock_back(machine, hw_state, number):
    process = spawn("hw", "clock-latency", "--backend", f"fake:{machine}", "--repeats", "50")
    read_until(process, "MHz: call")
    assert gpus_of(machine)[0]["locked"] == 1
    process.send_signal(number)
    assert process.wait(60) == 130
    process.communicate()
    assert gpus_of(machine)[0]["locked"] == 0
    assert not list(hw_state.glob("*.json"))


@pytest.mark.parametrize(
    ("option", "words"),
    [(["--out", "/no/where.csv"], "cannot write"), (["--into", "/no"], "no coefficient files")],
)
def test_clock_latency_says_before_it_measures_that_there_is_no_place_for_the_result(
    machine, option, words
):
    done = CliRunner().invoke(
        build(), ["hw", "clock-latency", "--backend", f"fake:{machine}", *option]
    )
    assert isinstance(done.exception, BiscaleError)
    assert words in str(done.exception)
    assert all(g["n_sets"] + g["n_resets"] == 0 for g in gpus_of(machine))


def test_a_log_that_cannot_be_written_is_one_sentence(machine, tmp_path, hw_state):
    for command in (
        ["actuate", "--gpus", "x=0", "--backend", f"fake:{machine}"],
        ["control", "--phase", "decode", "--policy", "max"],
    ):
        done = CliRunner().invoke(
            build(), ["hw", *command, "--sockets", str(tmp_path / "s"), "--log", "/no/where.jsonl"]
        )
        assert isinstance(done.exception, BiscaleError)
        assert "cannot write /no/where.jsonl" in str(done.exception)


def test_clock_latency_without_privilege_is_one_sentence_and_leaves_nothing(tmp_path, hw_state):
    machine = create_state(tmp_path / "gpus", 1, privileged=False)
    done = CliRunner().invoke(build(), ["hw", "clock-latency", "--backend", f"fake:{machine}"])
    assert isinstance(done.exception, ClockDenied)
    assert not list(hw_state.glob("*.json"))


# --- restore --------------------------------------------------------------------------------------


def test_restore_all_resets_everything(machine):
    backend = FakeBackend(machine)
    for device in backend.devices():
        backend.lock(device.uuid, 900, 900)
    done = CliRunner().invoke(build(), ["hw", "restore", "--all", "--backend", f"fake:{machine}"])
    assert done.exit_code == 0, done.output
    assert gpus_of(machine)["locked"].sum() == 0


def test_restore_all_goes_on_past_a_lost_gpu_and_one_with_an_owner(tmp_path, hw_state):
    """It stopped at the first of either, and the others stayed locked."""
    path = create_state(tmp_path / "gpus", 5, delay_s=0.0)
    backend = FakeBackend(path)
    uuids = [d.uuid for d in backend.devices()]
    backend.lock_all(uuids, 900, 900)
    owner.write_state(uuids[4], f"fake:{path}")
    with FakeState(path).locked() as gpus:
        gpus[0]["lost"] = 1
    with owner.OwnerLock(uuids[1]):
        done = CliRunner().invoke(build(), ["hw", "restore", "--all", "--backend", f"fake:{path}"])
    assert gpus_of(path)["locked"].tolist() == [1, 1, 0, 0, 0]
    assert isinstance(done.exception, BiscaleError)
    assert "2 of 5" in str(done.exception)
    said = dict(line.split(": ", 1) for line in done.output.splitlines() if ": " in line)
    assert "lost" in said[uuids[0]]
    assert "owner already" in said[uuids[1]]
    assert [said[u] for u in uuids[2:]] == ["reset"] * 3
    assert owner.recorded() == []


def test_restore_all_without_the_privilege_tries_each(tmp_path, hw_state):
    path = create_state(tmp_path / "gpus", 2, privileged=False)
    done = CliRunner().invoke(build(), ["hw", "restore", "--all", "--backend", f"fake:{path}"])
    assert done.output.count("NOT reset") == 2
    assert isinstance(done.exception, BiscaleError)


# --- recorder -------------------------------------------------------------------------------------


def test_telemetry_samples_at_its_rate_and_the_curve_is_the_energy(machine):
    backend = FakeBackend(machine)
    uuids = [d.uuid for d in backend.devices()]
    telemetry = Telemetry(backend, {"prefill": uuids}, hz=50)
    telemetry.start()
    time.sleep(0.6)
    telemetry.stop()
    frame = telemetry.frame()
    assert 40 <= len(frame) <= 80
    curve = EnergyCurve(frame, "prefill")
    begin = float(frame["time_s"].min()) + 0.1
    power_w = 2 * (100.0 + 50.0 * 1.98**3)
    assert curve.n_gpus == 2
    assert curve.between(begin, begin + 0.3) == pytest.approx(0.3 * power_w, rel=0.02)
    assert EnergyCurve(frame, "nobody").between(begin, begin + 1) == 0.0


def test_telemetry_survives_a_lost_gpu(machine):
    backend = FakeBackend(machine)
    uuids = [d.uuid for d in backend.devices()]
    with FakeState(machine).locked() as gpus:
        gpus[0]["lost"] = 1
    telemetry = Telemetry(backend, {"x": uuids}, hz=50)
    telemetry.start()
    time.sleep(0.1)
    telemetry.stop()
    assert set(telemetry.frame()["gpu"]) == {uuids[1]}
    assert "lost" in telemetry.problems[0]


@pytest.mark.slow
def test_iteration_log_keeps_every_record_and_notes_strangers(tmp_path):
    endpoint = wire.ipc(tmp_path / "all.sock")
    sender = Sender(None, endpoint)
    log = IterationLog({"decode": endpoint}, tmp_path / "i.jsonl")
    log.start()
    time.sleep(0.3)
    for k in range(50):
        sender.send(
            EngineRecord(
                counter_id=k,
                scheduled_requests=Scheduled(num_decode_requests=3),
                detail=Detail(float(k), 0.0, kv_use=0.5),
            )
        )
    sender.send(EngineRecord())  # idle heartbeat: no iteration
    sender.send(EngineRecord(version=7))
    time.sleep(0.3)
    log.stop()
    sender.close()
    assert [r.counter for r in log.rows] == list(range(50))
    assert log.rows[5].kv_use == 0.5
    assert len((tmp_path / "i.jsonl").read_text().splitlines()) == 50
    assert "version 7" in log.problems[0]


class GpmNvml(PythonNvml):
    """With Hopper's performance samples."""

    supported = 1

    def _nvmlGpmQueryDeviceSupport(self, handle, support):
        support._obj.isSupportedDevice = self.supported

    def _nvmlGpmSampleAlloc(self, sample):
        return 0

    def _nvmlGpmSampleGet(self, handle, sample):
        return 0

    def _nvmlGpmSampleFree(self, sample):
        return 0

    def _nvmlGpmMetricsGet(self, query):
        for k in range(query._obj.numMetrics):
            query._obj.metrics[k].value = 10.0 * query._obj.metrics[k].metricId


@pytest.mark.parametrize("supported", [0, 1])
def test_gpm_where_there_is_hopper(monkeypatch, supported):
    library = GpmNvml().install(monkeypatch)
    library.supported = supported
    backend = ObserveOnly(NvmlBackend())
    gpm = open_gpm(backend, [d.uuid for d in backend.devices()])
    if not supported:
        assert gpm is None
        return
    assert isinstance(gpm, Gpm)
    assert gpm.sample() == []  # too early for a difference
    gpm._due_s = 0.0
    first, second = gpm.sample()
    assert (first["tensor_util_pct"], first["dram_bw_util_pct"]) == (50.0, 100.0)
    assert first["gpu"] != second["gpu"]
    gpm.close()


def test_no_gpm_on_fake_gpus(machine):
    assert open_gpm(ObserveOnly(FakeBackend(machine)), []) is None


# --- bridge, bench, options -----------------------------------------------------------------------


@pytest.mark.slow
def test_bridge_hands_a_stream_to_the_controller(tmp_path):
    import zmq

    sockets = tmp_path / "s"
    source = wire.ipc(tmp_path / "fpm.sock")
    context = zmq.Context()
    publisher = wire.publisher(context, source)
    sockets.mkdir()
    receiver = wire.newest_receiver(context, wire.record_endpoint(sockets, "decode"))
    process = spawn(
        "hw", "bridge", "--phase", "decode", "--source", source, "--sockets", str(sockets)
    )
    read_until(process, "ready")
    from biscale_env.hardware.engines.hook import engine_record

    end = time.monotonic() + 10
    while not receiver.poll(20) and time.monotonic() < end:
        record = EngineRecord(
            worker_id="dynamo", scheduled_requests=Scheduled(num_decode_requests=2)
        )
        publisher.send_multipart([b"topic", b"0", engine_record.encode(record)])
    assert engine_record.decode(receiver.recv(zmq.NOBLOCK)).worker_id == "dynamo"
    process.terminate()
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "forwarded" in out
    receiver.close(0)
    wire.unbind(wire.record_endpoint(sockets, "decode"))
    wire.unbind(source)
    context.destroy(0)


def test_groups_of_gpus():
    assert parse_groups(["prefill=0-3", "decode=4,GPU-ab,7"]) == {
        "prefill": ("0", "1", "2", "3"),
        "decode": ("4", "GPU-ab", "7"),
    }


@pytest.mark.parametrize("item", ["prefill", "prefill=", "=0", "pre fill=0"])
def test_groups_that_make_no_sense(item):
    with pytest.raises(BiscaleError, match="--gpus"):
        parse_groups([item])
    with pytest.raises(BiscaleError, match="each name once"):
        parse_groups(["a=0", "a=1"])


def test_clock_bounds_come_from_the_description_of_the_gpu_or_from_the_device(tmp_path):
    toy = load_gpu(TOY_GPU)
    bounds = (toy.freq_min_mhz, toy.freq_max_mhz)
    assert clock_bounds(TOY_GPU) == bounds
    assert clock_bounds(None, toy_spec().to_yaml(tmp_path / "i.yaml")) == bounds
    assert clock_bounds(None) == (None, None)
    h100 = load_gpu("h100-sxm")
    assert clock_bounds(None, InstanceSpec().to_yaml(tmp_path / "h.yaml")) == (
        h100.freq_min_mhz,
        h100.freq_max_mhz,
    )


@pytest.mark.slow
def test_latency_stays_within_the_described_range(machine, tmp_path):
    description = yaml.safe_load(Path(TOY_GPU).read_text())
    description |= {
        "freq_min_mhz": 900.0,
        "freq_max_mhz": 1200.0,
        "control_levels_mhz": [900.0, 1200.0],
    }
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(description))
    out = tmp_path / "l.csv"
    arguments = ["hw", "clock-latency", "--backend", f"fake:{machine}", "--clocks", "2"]
    arguments += ["--repeats", "1", "--gpu-spec", str(tmp_path / "gpu.yaml"), "--out", str(out)]
    done = CliRunner().invoke(build(), arguments)
    assert done.exit_code == 0, done.output
    assert set(pd.read_csv(out)["to_mhz"]) == {900.0, 1200.0}


def test_a_description_of_another_gpu_is_said_before_anything_is_set(machine, tmp_path):
    with pytest.raises(BiscaleError, match="--gpu-spec"):
        change_latency.within([345.0, 360.0], 510.0, 1980.0)
    assert change_latency.within([345.0, 360.0, 375.0], None, 360.0) == [345.0, 360.0]


def test_an_instance_of_a_file_and_of_the_command_line(tmp_path):
    assert instance_of(None).max_seqs == 256
    assert instance_of(None, tp=8, slo=None) == InstanceSpec(max_seqs=256, tp=8)
    path = InstanceSpec(tp=2, max_seqs=64).to_yaml(tmp_path / "i.yaml")
    assert instance_of(path, token_budget=1024) == InstanceSpec(
        tp=2, max_seqs=64, token_budget=1024
    )
    with pytest.raises(BiscaleError, match="tp"):
        instance_of(path, tp=0)


def test_clocks_of_the_profiler():
    assert parse_clocks("default") == ()
    assert parse_clocks("810,1980") == (810.0, 1980.0)
    for text in ("fast", "810,x", "5"):
        with pytest.raises(BiscaleError, match="--clocks"):
            parse_clocks(text)


def test_hardware_is_needed_by_nothing_else():
    """No other room imports this one, except the commands that are about it."""
    root = Path(__file__).resolve().parents[2]
    guilty = [
        str(p.relative_to(root))
        for top in ("biscale_env", "controllers", "agents")
        for p in (root / top).rglob("*.py")
        if "biscale_env.hardware" in p.read_text()
        # the commands about it are in cli/hw; the dashboard follows a replay
        and not {"hardware", "hw", "dashboard"} & set(p.parts)
    ]
    assert guilty == []


def test_energy_curve_interpolates_between_samples():
    frame = pd.DataFrame(
        {
            "time_s": [0.0, 1.0, 0.0, 1.0],
            "group": "g",
            "gpu": ["a", "a", "b", "b"],
            "energy_j": [0.0, 10.0, 5.0, 25.0],
        }
    )
    curve = EnergyCurve(frame, "g")
    assert curve.at(np.array([0.0, 0.5, 1.0, 9.0])).tolist() == [5.0, 20.0, 35.0, 35.0]


@pytest.mark.parametrize(
    "words",
    [
        ["hw", "emulate"],
        ["hw", "restore"],
        ["validate", "x"],
        ["profile"],
        ["replay", "--trace", "x", "--decode", "http://x"],
    ],
)
def test_without_the_extra_one_sentence(monkeypatch, words):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "zmq" else real(name, *a)
    )
    done = CliRunner().invoke(build(), words)
    assert isinstance(done.exception, BiscaleError)
    assert "pip install 'biscale-env[hw]'" in str(done.exception)


def test_the_profiler_without_torch(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else real(name, *a)
    )
    done = CliRunner().invoke(build(), ["profile", "--backend", "none"])
    assert "needs torch" in str(done.exception)
