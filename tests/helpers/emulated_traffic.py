"""Emulated engines under somebody else's traffic, as `biscale hw observe` finds them."""

import asyncio
import contextlib
import os
import socket
import threading

import numpy as np

from biscale_env.hardware.emulation.emulate import Emulation, EmulatorSettings
from biscale_env.hardware.replay.client import LoadSettings, Replayer
from biscale_env.hardware.replay.closed_loop import wait_for_engines
from biscale_env.hardware.replay.engine_health import EngineGone
from biscale_env.traces import Trace


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def traffic_for(folder, seconds, rate_rps=3.0):
    """Backend, socket folder and environment of a pair of engines that are being used."""
    settings = EmulatorSettings(folder / "gpus", folder / "s", ports=(_free_port(), _free_port()))
    rng = np.random.default_rng(0)
    n = int(seconds * rate_rps)
    load = Trace(
        "traffic",
        np.sort(rng.uniform(0.0, seconds, n)),
        rng.integers(50, 800, n).astype(np.int32),
        rng.integers(20, 200, n).astype(np.int32),
        "test",
    )
    emulation = Emulation(settings)
    thread = None
    try:
        prefill, decode = emulation.urls
        wait_for_engines([prefill, decode], 200.0)
        replayer = Replayer(load, LoadSettings(decode, prefill, stall_s=120.0))

        def use():
            with contextlib.suppress(EngineGone):  # the engines end before their traffic does
                asyncio.run(replayer.run())

        thread = threading.Thread(target=use, daemon=True)
        thread.start()
        yield f"fake:{settings.state}", str(settings.sockets), dict(os.environ)
    finally:
        emulation.stop()
        if thread is not None:
            thread.join(30.0)
