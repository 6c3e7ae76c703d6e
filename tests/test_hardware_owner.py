"""Owner notes and orphan recovery."""

import json

import pytest
from hardware_helpers import gpus_of

from biscale_env.errors import BiscaleError
from biscale_env.hardware import owner
from biscale_env.hardware.fake import FakeBackend, FakeState, create_state

pytest_plugins = ["hardware_fixtures"]


@pytest.fixture
def machine(tmp_path, hw_state):
    backend = FakeBackend(create_state(tmp_path / "gpus", 3, delay_s=0.0))
    return backend, [d.uuid for d in backend.devices()]


def test_a_note_without_an_owner_is_an_orphan_and_gets_reset(machine):
    backend, (one, two, _) = machine
    claim = owner.Claim(two)
    for uuid in (one, two):
        owner.write_note(uuid, "fake")
        backend.lock(uuid, 900, 900)
    assert owner.orphans() == [one]
    assert owner.recover(backend, "fake") == [(one, "reset")]
    assert [backend.read(u).freq_mhz for u in (one, two)] == [1980.0, 900.0]
    assert owner.noted() == [two]
    claim.release()


def test_a_note_is_whole_and_says_whose(machine):
    owner.write_note(machine[1][0], "fake:x")
    note = owner.read_note(machine[1][0])
    assert (note["uuid"], note["backend"], note["boot_id"]) == (machine[1][0], "fake:x", owner.boot_id())
    assert [p.name for p in owner.state_dir().iterdir()] == [f"{machine[1][0]}.json"]  # no temporary file is left


def test_an_unreadable_note_still_names_its_gpu(machine):
    backend, (one, *_) = machine
    owner.write_note(one, "fake")
    owner.note_path(one).write_text("{ half")
    backend.lock(one, 900, 900)
    assert owner.recover(backend, "fake") == [(one, "reset")]
    assert backend.read(one).freq_mhz == 1980.0


def test_a_reboot_ended_the_lock(machine):
    backend, (one, *_) = machine
    owner.write_note(one, "fake")
    note = owner.read_note(one)
    owner.note_path(one).write_text(json.dumps({**note, "boot_id": "another"}))
    ((uuid, outcome),) = owner.recover(backend, "fake")
    assert uuid == one
    assert "rebooted" in outcome
    assert gpus_of(backend.state.path)[0]["n_resets"] == 0
    assert owner.noted() == []


def test_a_gpu_of_another_backend_is_left_alone(machine):
    backend, _ = machine
    owner.write_note("GPU-elsewhere", "nvml")
    ((_, outcome),) = owner.recover(backend, "fake")
    assert "nvml" in outcome
    assert owner.noted() == ["GPU-elsewhere"]


def test_a_gpu_that_cannot_be_reset_keeps_its_note(machine):
    backend, (one, *_) = machine
    owner.write_note(one, "fake")
    with FakeState(backend.state.path).locked() as gpus:
        gpus[0]["lost"] = 1
    ((_, outcome),) = owner.recover(backend, "fake")
    assert outcome.startswith("NOT reset")
    assert owner.noted() == [one]


def test_a_claim_excludes_and_is_freed():
    first = owner.Claim("GPU-test-claim")
    with pytest.raises(BiscaleError, match="owner already"):
        owner.Claim("GPU-test-claim")
    first.release()
    owner.Claim("GPU-test-claim").release()


def test_state_folder_of_root_and_of_others(monkeypatch, tmp_path):
    monkeypatch.delenv("BISCALE_HW_STATE", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert str(owner.state_dir()) == "/run/biscale-env"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert owner.state_dir().is_relative_to(tmp_path)
