"""An emulated deployment of two machines: up, replayed, validated, and every process killed once.

No clock is left locked, and no request is harmed by the death of a process of ours.
"""

import os
import signal

import pytest
from deployment_lab import LEASE_S, DeploymentLab
from hardware_helpers import wait_until

from biscale_env.hardware.deploy.deployed_raw import read_deployed
from biscale_env.hardware.deploy.deployed_validate import compare_deployed
from biscale_env.hardware.deploy.deployment_file import load_deployment
from biscale_env.hardware.deploy.live_status import ask_router

pytestmark = pytest.mark.slow
REPLAY = ("--trace", "azure-conv-like", "--rate", "4", "--wait", "60")
CALM_S = 0.008  # lateness of the emulated engines up to which 5 % of a P99 can be told


@pytest.fixture(scope="module")
def lab():
    made = DeploymentLab()
    try:
        made.emulate()
        made.up("a")
        made.up("b")
        yield made
    finally:
        made.close()


def replay(lab, name, seconds, **options):
    out = lab.folder / name
    arguments = ["replay", "--deployment", str(lab.file), *REPLAY, "--duration", str(seconds)]
    return out, lab.start(name, *arguments, "--out", str(out), **options)


def finished(process, timeout_s=240):
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out + err


def test_a_trace_is_served_controlled_recorded_and_simulated(lab):
    out, process = replay(lab, "first", 30)
    code, text = finished(process)
    assert code == 0, text
    raw = read_deployed(out / "raw")
    assert len(raw.requests) > 60
    assert not any(r.failed for r in raw.requests)
    assert set(raw.routes) == {r.index for r in raw.requests}
    assert all(raw.decisions[name] for name in raw.deployment.instances)
    for name, one in raw.deployment.instances.items():
        commanded = {c.freq_mhz for c in raw.changes if c.group == name and c.cause == "command"}
        assert commanded, f"no clock of {name} was set"
        if one.phase == "prefill":
            assert commanded == {1200.0}
    rows = compare_deployed(raw)
    late_s = max(raw.facts["lateness_p99_s"].values())
    for row in rows:
        if row.quantity == "energy_j" or (late_s < CALM_S and row.quantity == "tpot_p99_s"):
            assert row.agrees, row
    assert (out / "report.html").is_file()
    assert "cluster decode" in lab.run("validate", str(out))


def test_status_shows_every_instance(lab):
    text = lab.run("hw", "status", str(lab.file), "--once")
    for name in ("prefill_0", "prefill_1", "decode_0", "decode_1"):
        assert name in text
    assert "silent" not in text
    assert "0 failed" in text


def kill(lab, up, words):
    pid = lab.child(up, words)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid not in lab.children(up), 10)
    return pid


def test_every_process_of_ours_is_killed_once_under_load(lab):
    """Actuators, controllers and a machine's own process, while requests run."""
    deployment = load_deployment(str(lab.file))
    before = ask_router(deployment)
    out, process = replay(lab, "killed", 75)
    lab.until_locked("b", 8, 60)
    kill(lab, "up a", "prefill_1.yaml")  # a controller: b's lease runs out, then it is back
    lab.until_locked("b", 4, LEASE_S + 3)
    lab.until_locked("b", 8, 60)
    kill(lab, "up b", "actuator.yaml")  # its successor resets, then commands are obeyed again
    lab.until_locked("b", 0, 20)
    lab.until_locked("b", 8, 60)
    machine = lab.processes["up b"]
    machine.kill()  # its actuator ends with it, and resets
    machine.wait()
    lab.until_locked("b", 0, 10)
    lab.up("b")
    lab.until_locked("b", 8, 60)
    code, text = finished(process)
    assert code == 0, text
    raw = read_deployed(out / "raw")
    assert not any(r.failed for r in raw.requests)
    after = ask_router(deployment)
    assert after.failed == before.failed
    assert after.requests - before.requests == len(raw.requests)


def test_everything_is_reset_at_the_end(lab):
    for machine in "ba":
        code, text = lab.stop(f"up {machine}")
        assert code == 0, text
    assert (lab.locked("a"), lab.locked("b")) == (0, 0)
    assert "nothing to restore" in lab.run("hw", "restore", str(lab.file))
    text = lab.run("replay", "--deployment", str(lab.file), *REPLAY, "--duration", "5", code=2)
    assert "is silent: run `biscale hw up` there; nothing was sent" in text
