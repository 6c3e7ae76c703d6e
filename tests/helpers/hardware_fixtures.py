"""Fixtures of the hardware tests; test modules load them with ``pytest_plugins``."""

import ctypes
import os
import shutil
import subprocess

import pynvml
import pytest
from hardware_helpers import C_SOURCE

from biscale_env.hardware.clocks.nvml import NvmlBackend


@pytest.fixture(scope="session")
def fake_library_path(tmp_path_factory):
    """The C stand-in, compiled as libnvidia-ml.so.1."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler on this machine")
    path = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    command = [
        compiler,
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libnvidia-ml.so.1",
        "-o",
        str(path),
        str(C_SOURCE),
        "-lm",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def fake_library(fake_library_path):
    """The C stand-in, loaded."""
    library = ctypes.CDLL(str(fake_library_path))
    library.fake_header_bytes.restype = library.fake_gpu_bytes.restype = ctypes.c_int64
    return library


@pytest.fixture
def c_nvml(fake_library_path, tmp_path, monkeypatch):
    """Open the real NVML backend on the C stand-in and a state file.

    Each test gets its own copy of the library.
    """
    own = tmp_path / "own-libnvidia-ml.so.1"
    shutil.copy(fake_library_path, own)

    def open_backend(state):
        monkeypatch.setenv("FAKE_NVML_STATE", str(state))
        # os.environ of a running process reaches getenv in C through putenv, which
        # monkeypatch.setenv calls
        assert os.environ["FAKE_NVML_STATE"] == str(state)
        monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(own)))
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        return NvmlBackend()

    return open_backend


@pytest.fixture
def hw_state(tmp_path, monkeypatch):
    """Folder of the state files, for this test only."""
    folder = tmp_path / "owned"
    monkeypatch.setenv("BISCALE_HW_STATE", str(folder))
    return folder
