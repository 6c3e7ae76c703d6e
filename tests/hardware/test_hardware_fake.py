"""The fake GPUs: known answers for clocks, delay, energy.

And the C library tells the same story about the same file.
"""

import math
import time

import numpy as np
import pytest
from hardware_helpers import gpus_of
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks.backend import ClockDenied, ClockError, GpuLost
from biscale_env.hardware.clocks.fake_gpus import (
    GPU_DTYPE,
    HEADER_DTYPE,
    FakeBackend,
    FakeState,
    create_state,
    settle,
    want,
)

pytest_plugins = ["hardware_fixtures"]


def one_gpu(delay_s):
    gpu = np.zeros(1, GPU_DTYPE)[0]
    for name in (
        "freq_mhz",
        "inflight_mhz",
        "wanted_mhz",
        "previous_mhz",
        "default_mhz",
        "max_mhz",
    ):
        gpu[name] = 1980.0
    gpu["apply_at_s"] = math.inf
    gpu["toy_idle_w"], gpu["toy_slope_w"] = 100.0, 50.0
    return gpu


def test_a_clock_takes_its_delay_and_the_energy_is_the_integral():
    gpu = one_gpu(0.05)
    settle(gpu, 10.0, 0.05)
    gpu["energy_j"] = 0.0
    want(gpu, 1000.0, 10.0, 0.05)
    settle(gpu, 10.04, 0.05)
    assert gpu["freq_mhz"] == 1980.0
    settle(gpu, 11.05, 0.05)
    assert (gpu["freq_mhz"], gpu["previous_mhz"], gpu["landed_at_s"]) == (1000.0, 1980.0, 10.05)
    high_w, low_w = 100.0 + 50.0 * 1.98**3, 150.0
    assert gpu["energy_j"] == pytest.approx(0.05 * high_w + 1.0 * low_w)


def test_the_newest_wish_waits_behind_the_one_on_its_way():
    gpu = one_gpu(0.05)
    want(gpu, 1000.0, 1.0, 0.05)
    settle(gpu, 1.01, 0.05)
    want(gpu, 1200.0, 1.01, 0.05)
    want(gpu, 1500.0, 1.02, 0.05)  # replaces the waiting wish
    settle(gpu, 1.06, 0.05)
    assert gpu["freq_mhz"] == 1000.0
    settle(gpu, 1.11, 0.05)
    assert gpu["freq_mhz"] == 1500.0
    assert math.isinf(gpu["apply_at_s"])


@settings(max_examples=60, deadline=None)
@given(
    wishes=st.lists(
        st.tuples(st.floats(0.0, 0.2), st.integers(0, 98).map(lambda k: 510.0 + 15.0 * k)),
        min_size=1,
        max_size=12,
    ),
    delay_s=st.sampled_from([0.0, 0.01, 0.05]),
)
def test_the_last_wish_always_wins_in_the_end(wishes, delay_s):
    gpu, now = one_gpu(delay_s), 0.0
    for gap, freq in wishes:
        now += gap
        settle(gpu, now, delay_s)
        want(gpu, freq, now, delay_s)
    settle(gpu, now + 2 * delay_s + 1e-6, delay_s)
    assert gpu["freq_mhz"] == wishes[-1][1]


def test_lock_snaps_to_the_grid_and_reset_gives_the_default_back(tmp_path):
    backend = FakeBackend(create_state(tmp_path / "gpus", 2, delay_s=0.0))
    uuid = backend.devices()[1].uuid
    backend.lock(uuid, 1204.0, 1204.0)
    assert backend.read(uuid).freq_mhz == 1200.0
    assert backend.read(backend.devices()[0].uuid).freq_mhz == 1980.0
    backend.reset(uuid)
    assert backend.read(uuid).freq_mhz == 1980.0
    assert [int(g["n_sets"]) for g in gpus_of(tmp_path / "gpus")] == [0, 1]


@pytest.mark.parametrize(("low", "high"), [(0, 900), (900, 800), (100, 100), (2500, 2500)])
def test_impossible_pairs_are_refused(tmp_path, low, high):
    backend = FakeBackend(create_state(tmp_path / "gpus", 1))
    with pytest.raises(ClockError, match="invalid"):
        backend.lock(backend.devices()[0].uuid, low, high)


def test_without_privilege_nothing_moves(tmp_path):
    backend = FakeBackend(create_state(tmp_path / "gpus", 1, privileged=False))
    uuid = backend.devices()[0].uuid
    for change in (lambda: backend.lock(uuid, 900, 900), lambda: backend.reset(uuid)):
        with pytest.raises(ClockDenied):
            change()
    assert gpus_of(tmp_path / "gpus")[0]["n_sets"] == 0


def test_a_lost_gpu_says_so(tmp_path):
    backend = FakeBackend(create_state(tmp_path / "gpus", 1))
    with FakeState(tmp_path / "gpus").locked() as gpus:
        gpus[0]["lost"] = 1
    with pytest.raises(GpuLost):
        backend.read(backend.devices()[0].uuid)


@pytest.mark.parametrize("library", ["python", "c"])
@pytest.mark.parametrize("first", ["clock", "limit"])
def test_a_clock_and_a_limit_land_in_the_order_of_their_times(tmp_path, c_nvml, library, first):
    """Nobody has looked since: the energy between the two is counted once."""
    path = create_state(tmp_path / "gpus", 1, delay_s=0.05)
    gpu, now = FakeState(path).gpus[0], time.monotonic()
    gpu["inflight_mhz"] = gpu["wanted_mhz"] = 1000.0
    gpu["limit_inflight_w"] = gpu["limit_wanted_w"] = 125.0
    gpu["apply_at_s"], gpu["limit_at_s"] = now - 3.0, now - 1.0
    between_w = 150.0
    if first == "limit":
        gpu["apply_at_s"], gpu["limit_at_s"] = now - 1.0, now - 3.0
        between_w = 125.0
    gpu["energy_j"], gpu["power_at_s"] = 0.0, now - 5.0
    backend = c_nvml(path) if library == "c" else FakeBackend(path)
    energy_j = backend.energy_j(backend.devices()[0].uuid)
    high_w = 100.0 + 50.0 * 1.98**3
    most_j = 2.0 * high_w + 2.0 * between_w + 125.0 * (time.monotonic() - now + 1.0)
    assert most_j - 125.0 * (time.monotonic() - now) - 0.1 <= energy_j <= most_j + 0.1
    assert (gpu["freq_mhz"], gpu["limit_w"], gpu["power_w"]) == pytest.approx((1000, 125, 125))


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 4096])
def test_a_wrong_file_is_named(tmp_path, content):
    (tmp_path / "gpus").write_bytes(content)
    with pytest.raises(BiscaleError, match="gpus"):
        FakeBackend(tmp_path / "gpus")


def test_a_missing_file_says_what_makes_it(tmp_path):
    with pytest.raises(BiscaleError, match="hw emulate"):
        FakeBackend(tmp_path / "none")


def test_c_layout_equals_python_layout(fake_library):
    assert fake_library.fake_header_bytes() == HEADER_DTYPE.itemsize
    assert fake_library.fake_gpu_bytes() == GPU_DTYPE.itemsize


def test_c_library_and_python_backend_agree(tmp_path, c_nvml):
    path = create_state(tmp_path / "gpus", 3, delay_s=0.03)
    mine, theirs = FakeBackend(path), c_nvml(path)
    assert mine.devices() == theirs.devices()
    uuid = mine.devices()[2].uuid
    assert mine.supported_mhz(uuid) == theirs.supported_mhz(uuid)
    theirs.lock(uuid, 1204, 1204)
    assert mine.read(uuid).freq_mhz == theirs.read(uuid).freq_mhz == 1980.0
    time.sleep(0.04)
    assert mine.read(uuid).freq_mhz == theirs.read(uuid).freq_mhz == 1200.0
    assert theirs.read(uuid).power_w == pytest.approx(mine.read(uuid).power_w, abs=0.01)
    assert theirs.energy_j(uuid) == pytest.approx(mine.energy_j(uuid), rel=0.01, abs=0.2)
    mine.reset(uuid)
    time.sleep(0.04)
    assert theirs.read(uuid).freq_mhz == 1980.0
    with pytest.raises(ClockError):
        theirs.lock(uuid, 100, 100)
    with FakeState(path).locked() as gpus:
        gpus[2]["effective_mhz"] = 1400.0
        gpus[2]["lost"] = 0
    assert mine.read(uuid).freq_mhz == theirs.read(uuid).freq_mhz == 1400.0


def test_c_library_takes_the_set_latency_and_the_privilege_from_the_file(tmp_path, c_nvml):
    path = create_state(tmp_path / "gpus", 1, set_latency_us=20_000)
    backend = c_nvml(path)
    start = time.monotonic()
    backend.lock(backend.devices()[0].uuid, 900, 900)
    assert time.monotonic() - start >= 0.02
    FakeState(path).header["privileged"] = 0
    with pytest.raises(ClockDenied):
        backend.lock(backend.devices()[0].uuid, 1200, 1200)
