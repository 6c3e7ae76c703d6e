"""Owner locks, state files and the recovery of orphans."""

import io
import json
import subprocess
import sys
import textwrap
import threading

import pytest
from hardware_helpers import REPOSITORY, gpus_of

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks import owner
from biscale_env.hardware.clocks.backend import ATTEMPTS, ClockDenied, ClockError
from biscale_env.hardware.clocks.fake_gpus import FakeBackend, FakeState, create_state

pytest_plugins = ["hardware_fixtures"]


@pytest.fixture
def machine(tmp_path, hw_state):
    backend = FakeBackend(create_state(tmp_path / "gpus", 3, delay_s=0.0))
    return backend, [d.uuid for d in backend.devices()]


def test_a_note_without_an_owner_is_an_orphan_and_gets_reset(machine):
    backend, (one, two, _) = machine
    claim = owner.OwnerLock(two)
    for uuid in (one, two):
        owner.write_state(uuid, "fake")
        backend.lock(uuid, 900, 900)
    assert owner.orphans() == [one]
    assert owner.recover(backend, "fake") == [(one, "reset", False)]
    assert [backend.read(u).freq_mhz for u in (one, two)] == [1980.0, 900.0]
    assert owner.recorded() == [two]
    claim.release()


def test_a_note_is_whole_and_says_whose(machine):
    owner.write_state(machine[1][0], "fake:x")
    note = owner.read_state(machine[1][0])
    assert (note["uuid"], note["backend"], note["boot_id"]) == (
        machine[1][0],
        "fake:x",
        owner.boot_id(),
    )
    assert [p.name for p in owner.state_dir().iterdir() if p.is_file()] == [
        f"{machine[1][0]}.json"
    ]  # no temporary file is left


def test_an_unreadable_note_still_names_its_gpu(machine):
    backend, (one, *_) = machine
    owner.write_state(one, "fake")
    owner.state_path(one).write_text("{ half")
    backend.lock(one, 900, 900)
    assert owner.recover(backend, "fake") == [(one, "reset", False)]
    assert backend.read(one).freq_mhz == 1980.0


def test_a_reboot_ended_the_lock(machine):
    backend, (one, *_) = machine
    owner.write_state(one, "fake")
    note = owner.read_state(one)
    owner.state_path(one).write_text(json.dumps({**note, "boot_id": "another"}))
    ((uuid, outcome, _),) = owner.recover(backend, "fake")
    assert uuid == one
    assert "rebooted" in outcome
    assert gpus_of(backend.state.path)[0]["n_resets"] == 0
    assert owner.recorded() == []


def test_a_gpu_of_another_backend_is_left_alone(machine):
    backend, _ = machine
    owner.write_state("GPU-elsewhere", "nvml")
    ((_, outcome, _),) = owner.recover(backend, "fake")
    assert "nvml" in outcome
    assert owner.recorded() == ["GPU-elsewhere"]


def test_fake_gpus_whose_file_was_made_anew_are_forgotten(machine):
    backend, (one, *_) = machine
    name = f"fake:{backend.state.path}"
    owner.write_state(one, name)
    owner.write_state("GPU-real", "nvml")
    again = FakeBackend(create_state(backend.state.path, 3))
    outcomes = {r.uuid: r.text for r in owner.recover(again, name)}
    assert "gone" in outcomes[one]
    assert owner.recorded() == ["GPU-real"]  # a real GPU that is not seen may come back


def test_a_gpu_that_cannot_be_reset_keeps_its_note(machine):
    backend, (one, *_) = machine
    owner.write_state(one, "fake")
    with FakeState(backend.state.path).locked() as gpus:
        gpus[0]["lost"] = 1
    ((_, outcome, _),) = owner.recover(backend, "fake")
    assert outcome.startswith("NOT reset")
    assert owner.recorded() == [one]


def test_alone_notes_before_it_locks_and_gives_back_however_it_ends(machine):
    backend, (one, *_) = machine
    with owner.exclusive(backend, "fake", one):
        assert owner.recorded() == [one]
        assert owner.orphans() == []  # claimed
        backend.lock(one, 900, 900)
    assert owner.recorded() == []

    def cut_off():
        with owner.exclusive(backend, "fake", one):
            backend.lock(one, 900, 900)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert gpus_of(backend.state.path)[0]["locked"] == 0
    assert owner.recorded() == []
    owner.OwnerLock(one).release()


def test_alone_without_privilege_leaves_no_note(tmp_path, hw_state):
    backend = FakeBackend(create_state(tmp_path / "gpus", 1, privileged=False))
    uuid = backend.devices()[0].uuid
    with pytest.raises(ClockDenied), owner.exclusive(backend, "fake", uuid):
        raise AssertionError("never gets here")
    assert owner.recorded() == []
    owner.OwnerLock(uuid).release()


def test_alone_keeps_the_note_of_a_gpu_that_falls_off_the_bus(machine):
    backend, (one, *_) = machine
    with (
        pytest.raises(ClockError, match="hw restore"),
        owner.exclusive(backend, "fake", one),
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
    owner.write_state(one, "fake")
    backend.lock(one, 900, 900)
    assert owner.reset_and_forget(stubborn, [one]) == {}
    assert backend.read(one).freq_mhz == 1980.0
    assert owner.recorded() == []
    stubborn.refusals = ATTEMPTS
    owner.write_state(one, "fake")
    assert "not now" in str(owner.reset_and_forget(stubborn, [one])[one])
    assert owner.recorded() == [one]


@pytest.mark.slow
def test_of_many_that_want_a_gpu_at_once_exactly_one_gets_it(hw_state):
    """No window between looking and taking: forty threads, released together, many times."""
    for _ in range(20):
        gate, won = threading.Barrier(40), []

        def want(gate=gate, won=won):
            gate.wait()
            try:
                won.append(owner.OwnerLock("GPU-race"))
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


def test_an_owner_lock_excludes_and_is_freed(hw_state):
    first = owner.OwnerLock("GPU-test-claim")
    with pytest.raises(BiscaleError, match="owner already"):
        owner.OwnerLock("GPU-test-claim")
    first.release()
    owner.OwnerLock("GPU-test-claim").release()


def test_state_folder_of_root_and_of_others(monkeypatch, tmp_path):
    monkeypatch.delenv("BISCALE_HW_STATE", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert str(owner.state_dir()) == "/run/biscale-env"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert owner.state_dir().is_relative_to(tmp_path)


def test_the_lock_in_the_state_folder_alone_excludes(hw_state, monkeypatch):
    """As between containers that share the folder but not the network namespace."""
    first = owner.OwnerLock("GPU-x")
    monkeypatch.setattr(owner, "hold", lambda name: io.BytesIO())
    with pytest.raises(owner.OwnerBusy, match="owner already"):
        owner.OwnerLock("GPU-x")
    first.release()
    owner.OwnerLock("GPU-x").release()


def test_the_name_alone_excludes_owners_with_another_state_folder(tmp_path, monkeypatch):
    """As between users of one machine."""
    monkeypatch.setenv("BISCALE_HW_STATE", str(tmp_path / "one"))
    with owner.OwnerLock("GPU-x"):
        monkeypatch.setenv("BISCALE_HW_STATE", str(tmp_path / "two"))
        with pytest.raises(owner.OwnerBusy):
            owner.OwnerLock("GPU-x")
    owner.OwnerLock("GPU-x").release()


@pytest.mark.slow
def test_a_killed_owner_holds_nothing(hw_state):
    code = """
        import os, time
        from biscale_env.hardware.clocks import owner
        lock = owner.OwnerLock("GPU-x")
        print("held", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(owner.OwnerBusy):
            owner.OwnerLock("GPU-x")
        process.kill()
        process.wait()
        owner.OwnerLock("GPU-x").release()
    finally:
        process.kill()
        process.stdout.close()


def test_an_orphan_is_not_reset_under_the_hands_of_a_new_owner(machine):
    """Between the look for a living owner and the reset another actuator could take the GPU."""
    backend, (one, *_) = machine
    owner.write_state(one, "fake")
    seen = []

    class Watching(FakeBackend):
        def reset(self, uuid):
            try:
                owner.OwnerLock(uuid).release()
            except owner.OwnerBusy:
                seen.append(uuid)
            super().reset(uuid)

    assert owner.recover(Watching(backend.state.path), "fake") == [(one, "reset", False)]
    assert seen == [one]


def test_a_file_that_is_being_written_is_no_gpu(machine):
    owner.write_state(machine[1][0], "fake")
    (owner.state_dir() / ".0123abcd.GPU-y.json").write_text("{")
    assert owner.recorded() == [machine[1][0]]
