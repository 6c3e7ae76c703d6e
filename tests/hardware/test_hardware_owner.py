"""Owner notes and orphan recovery."""

import json
import threading

import pytest
from hardware_helpers import gpus_of

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks import owner
from biscale_env.hardware.clocks.backend import ClockDenied, ClockError
from biscale_env.hardware.clocks.fake_gpus import FakeBackend, FakeState, create_state

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
    assert (note["uuid"], note["backend"], note["boot_id"]) == (
        machine[1][0],
        "fake:x",
        owner.boot_id(),
    )
    assert [p.name for p in owner.state_dir().iterdir()] == [
        f"{machine[1][0]}.json"
    ]  # no temporary file is left


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


def test_fake_gpus_whose_file_was_made_anew_are_forgotten(machine):
    backend, (one, *_) = machine
    name = f"fake:{backend.state.path}"
    owner.write_note(one, name)
    owner.write_note("GPU-real", "nvml")
    again = FakeBackend(create_state(backend.state.path, 3))
    outcomes = dict(owner.recover(again, name))
    assert "gone" in outcomes[one]
    assert owner.noted() == ["GPU-real"]  # a real GPU that is not seen may come back


def test_a_gpu_that_cannot_be_reset_keeps_its_note(machine):
    backend, (one, *_) = machine
    owner.write_note(one, "fake")
    with FakeState(backend.state.path).locked() as gpus:
        gpus[0]["lost"] = 1
    ((_, outcome),) = owner.recover(backend, "fake")
    assert outcome.startswith("NOT reset")
    assert owner.noted() == [one]


def test_alone_notes_before_it_locks_and_gives_back_however_it_ends(machine):
    backend, (one, *_) = machine
    with owner.alone(backend, "fake", one):
        assert owner.noted() == [one]
        assert owner.orphans() == []  # claimed
        backend.lock(one, 900, 900)
    assert owner.noted() == []

    def cut_off():
        with owner.alone(backend, "fake", one):
            backend.lock(one, 900, 900)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert gpus_of(backend.state.path)[0]["locked"] == 0
    assert owner.noted() == []
    owner.Claim(one).release()


def test_alone_without_privilege_leaves_no_note(tmp_path, hw_state):
    backend = FakeBackend(create_state(tmp_path / "gpus", 1, privileged=False))
    uuid = backend.devices()[0].uuid
    with pytest.raises(ClockDenied), owner.alone(backend, "fake", uuid):
        raise AssertionError("never gets here")
    assert owner.noted() == []
    owner.Claim(uuid).release()


def test_alone_keeps_the_note_of_a_gpu_that_falls_off_the_bus(machine):
    backend, (one, *_) = machine
    with (
        pytest.raises(ClockError, match="hw restore"),
        owner.alone(backend, "fake", one),
        FakeState(backend.state.path).locked() as gpus,
    ):
        gpus[0]["lost"] = 1
    assert owner.orphans() == [one]


class Stubborn(FakeBackend):
    """Refuses the first resets."""

    refusals = 2

    def reset(self, uuid):
        if self.refusals > 0:
            self.refusals -= 1
            raise ClockError("not now")
        super().reset(uuid)


def test_a_reset_is_tried_again(machine):
    backend, (one, *_) = machine
    stubborn = Stubborn(backend.state.path)
    owner.write_note(one, "fake")
    backend.lock(one, 900, 900)
    owner.give_back(stubborn, one)
    assert backend.read(one).freq_mhz == 1980.0
    assert owner.noted() == []
    stubborn.refusals = owner.RESET_ATTEMPTS
    owner.write_note(one, "fake")
    with pytest.raises(ClockError, match="not now"):
        owner.give_back(stubborn, one)
    assert owner.noted() == [one]


def test_of_many_that_want_a_gpu_at_once_exactly_one_gets_it():
    """No window between looking and taking: forty threads, released together, many times."""
    for _ in range(20):
        gate, won = threading.Barrier(40), []

        def want(gate=gate, won=won):
            gate.wait()
            try:
                won.append(owner.Claim("GPU-race"))
            except BiscaleError:
                return

        threads = [threading.Thread(target=want) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].release()


def test_a_lost_gpu_does_not_keep_the_others_from_being_reset(machine):
    backend, uuids = machine
    backend.lock_all(uuids, 900, 900)
    with FakeState(backend.state.path).locked() as gpus:
        gpus[0]["lost"] = 1
    with pytest.raises(ClockError, match="lost"):
        backend.reset_all(uuids)
    assert gpus_of(backend.state.path)["locked"].tolist() == [1, 0, 0]


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
