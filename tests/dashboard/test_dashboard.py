"""What is behind the dashboard's pages, and who may look at them."""

import builtins
import importlib
import json
import socket
import sys

import numpy as np
import pytest
from evaluation_synthetic import plausible

from biscale_env.core.errors import BiscaleError
from biscale_env.dashboard.log_tail import KEPT_S, LogTail, bounds_of
from biscale_env.dashboard.watched_folder import kind_of
from biscale_env.evaluation.runs.rundir import RunDirectory


def test_the_kind_of_a_folder_follows_what_it_holds(tmp_path):
    with pytest.raises(BiscaleError, match="is no folder"):
        kind_of(tmp_path / "none")
    with pytest.raises(BiscaleError, match="neither results"):
        kind_of(tmp_path)
    seeds = tmp_path / "seeds" / "seed-3"
    seeds.mkdir(parents=True)
    (seeds / "evaluations.csv").touch()
    assert kind_of(tmp_path / "seeds") == kind_of(seeds) == "training"
    run = tmp_path / "run"
    with RunDirectory(run, {}) as directory:
        with pytest.raises(BiscaleError, match="has not finished"):
            kind_of(run)
        directory.add(plausible("decode", "max", duration_s=5.0))
    assert kind_of(run) == "run"
    (run / "raw").mkdir()
    assert kind_of(run) == "run"  # a replay that has ended
    (run / "results.parquet").unlink()
    assert kind_of(run) == "replay"


def test_a_tail_reads_whole_lines_once(tmp_path):
    path = tmp_path / "log"
    tail = LogTail(path)
    assert tail.new_lines() == b""
    path.write_bytes(b"one\ntw")
    assert tail.new_lines() == b"one\n"
    assert tail.new_lines() == b""
    with path.open("ab") as file:
        file.write(b"o\nthree\n")
    assert tail.new_lines() == b"two\nthree\n"
    path.write_bytes(b"new\n")  # begun anew
    assert tail.new_lines() == b"new\n"


def test_the_tables_of_a_replay_by_hand(tmp_path):
    pytest.importorskip("zmq", reason="needs the extra 'hw'")
    from biscale_env.dashboard.log_tail import ReplayLogs

    raw = tmp_path / "raw"
    raw.mkdir()
    times = {"scheduled_s": 100.0, "prefill_done_s": 100.2, "first_chunk_s": 100.3}
    request = {"index": 0, "prompt_tokens": 9, "output_tokens": 5, "last_chunk_s": 100.7} | times
    failed = {"index": 1, "scheduled_s": 101.0, "prompt_tokens": 9, "output_tokens": 5}
    lines = [request, failed | {"error": "gone", "last_chunk_s": None}]
    (raw / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"time_s": 99.7, "group": "decode", "freq_mhz": None, "power_w": 250.0}
    (raw / "live.jsonl").write_text(json.dumps(sample) + "\n")
    logs = ReplayLogs(raw)
    tables = logs.tables()
    np.testing.assert_allclose(tables["telemetry"]["time_s"], [0.0])
    assert np.isnan(tables["telemetry"]["freq_mhz"]).all()
    np.testing.assert_allclose(tables["requests"]["time_s"], [1.0, 1.3])
    np.testing.assert_allclose(tables["requests"]["ttft_ms"], [200.0, np.nan])
    np.testing.assert_allclose(tables["requests"]["tpot_ms"], [100.0, np.nan])
    assert (logs.finished, logs.failed) == (2, 1)
    later = sample | {"time_s": 99.7 + KEPT_S + 1}
    with (raw / "live.jsonl").open("a") as file:
        file.write(json.dumps(later) + "\n")
    assert logs.tables()["telemetry"]["time_s"].tolist() == pytest.approx([KEPT_S + 1])
    assert logs.finished == 2


def test_live_samples_are_means_over_gpus_and_few(tmp_path):
    pytest.importorskip("msgspec", reason="needs the extra 'hw'")
    from biscale_env.hardware.replay.live_samples import LiveSamples

    path = tmp_path / "live.jsonl"
    live = LiveSamples(path)
    for k in range(20):  # two GPUs at 20 Hz
        row = (10.0 + 0.05 * k, "decode")
        live.take([(*row, "a", 900.0, 300.0), (*row, "b", 1100.0, float("nan"))])
    live.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["time_s"], r["freq_mhz"], r["power_w"]) for r in rows] == [
        (10.0, 1000.0, 300.0),
        (pytest.approx(10.5), 1000.0, 300.0),
    ]
    nowhere = LiveSamples(tmp_path / "none" / "live.jsonl")
    nowhere.take([(0.0, "decode", "a", 1.0, 1.0)])
    nowhere.close()


def test_bounds_come_from_the_replays_configuration(tmp_path):
    assert bounds_of(tmp_path) == {}
    (tmp_path / "config.yaml").write_text("replay:\n  instance:\n    slo: biscale\n")
    found = bounds_of(tmp_path)
    assert found == {"ttft": pytest.approx(600.0), "tpot": pytest.approx(100.0)}  # ms


def test_the_command_says_what_it_lacks(tmp_path, monkeypatch):
    from biscale_env.cli.dashboard_command import dashboard

    usual = builtins.__import__

    def without_dash(name, *args, **kwargs):
        if name.split(".")[0] == "dash":
            raise ModuleNotFoundError(f"No module named '{name}'", name="dash")
        return usual(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.startswith("biscale_env.dashboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_dash)
    with pytest.raises(BiscaleError, match=r"pip install 'biscale-env\[dashboard\]'"):
        dashboard(tmp_path)


class TestServed:
    """The server itself; needs the extra ``dashboard``."""

    @pytest.fixture
    def web(self):
        pytest.importorskip(
            "dash", reason="needs the extra 'dashboard': pip install 'biscale-env[dashboard]'"
        )
        return importlib.import_module("biscale_env.dashboard.web_app")

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "evaluations.csv").touch()
        return tmp_path

    def test_only_this_machine_by_its_own_names(self, web, folder):
        client = web.make_app(folder).server.test_client()
        assert client.get("/", headers={"Host": "127.0.0.1:8050"}).status_code == 200
        assert client.get("/", headers={"Host": "localhost:8050"}).status_code == 200
        # a page from elsewhere whose name was pointed at this machine
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
        everybody = web.make_app(folder, hosts=()).server.test_client()
        assert everybody.get("/", headers={"Host": "lab.example"}).status_code == 200
        assert [web.is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0")] == [
            True,
            True,
            True,
            False,
        ]

    def test_a_taken_port_is_a_sentence(self, web, folder):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(BiscaleError, match=f"port {port}: address already in use"):
                web.serve(folder, "127.0.0.1", port)

    def test_points_that_belong_together_are_shown_together(self, web, tmp_path):
        from biscale_env.dashboard.run_session import RunSession

        with RunDirectory(tmp_path / "run", {}) as directory:
            for phase, load in (("prefill", 0.5), ("prefill", 0.8), ("decode", 0.5)):
                directory.add(plausible(phase, "max", load=load, duration_s=5.0))
        session = RunSession(tmp_path / "run")
        titles = session.titles()
        assert {titles[k] for k in session.first_points()} in (
            {"prefill, load 0.5", "decode, load 0.5"},
        )
