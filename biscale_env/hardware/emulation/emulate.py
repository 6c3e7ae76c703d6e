"""`biscale hw emulate`: fake GPUs, an emulated prefill engine and an emulated decode engine, each
its own process.
"""

import asyncio
import hashlib
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.clocks.fake_gpus import FakeState, create_state
from biscale_env.hardware.clocks.owner import hold
from biscale_env.hardware.emulation.emulator import Instance
from biscale_env.hardware.emulation.emulator_http import EngineServer, serve
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.processes import Child, tuned_for_latency

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class EmulatorSettings:
    """What is emulated.

    Attributes:
        state: file of the fake GPUs; prefill takes the first ``tp``, decode the next.
        sockets: folder of the record sockets.
        host: address to listen at.
        ports: port per phase.
        tp: GPUs per instance.
        dtype: ``bf16`` or ``fp8``.
        model: model family.
        token_budget: new tokens per prefill batch.
        max_seqs: requests per batch.
        max_model_len: context length.
        delay_s: actuation delay of the fake GPUs, s.
        member: ensemble member of the emulated plant.
    """

    state: Path
    sockets: Path
    host: str = "127.0.0.1"
    ports: tuple[int, int] = (8100, 8200)
    tp: int = 4
    dtype: str = "bf16"
    model: str = "h100-llama70b"
    token_budget: int = 2048
    max_seqs: int = 256
    max_model_len: int = 16_384
    delay_s: float = 0.05
    member: int = -1

    def plant(self, phase: str) -> Plant:
        """Plant of one instance."""
        settings = PlantSettings.of(
            phase, model=self.model, tp=self.tp, dtype=self.dtype, token_budget=self.token_budget, max_seqs=self.max_seqs,
            actuation_delay_s=self.delay_s, ensemble_member=self.member,
        )  # fmt: skip
        return Plant(settings)

    def gpus(self, phase: str) -> list[int]:
        """Fake GPUs of one instance."""
        first = 0 if phase == "prefill" else self.tp
        return list(range(first, first + self.tp))

    def arguments(self, phase: str) -> list[str]:
        """Command line of the process of one instance."""
        return [
            "hw", "emulate", "--phase", phase, "--state", str(self.state), "--sockets", str(self.sockets), "--host", self.host,
            "--prefill-port", str(self.ports[0]), "--decode-port", str(self.ports[1]), "--tp", str(self.tp), "--dtype", self.dtype,
            "--model", self.model, "--token-budget", str(self.token_budget), "--max-seqs", str(self.max_seqs),
            "--max-model-len", str(self.max_model_len), "--delay", str(self.delay_s), "--member", str(self.member),
        ]  # fmt: skip


def all_records_endpoint(sockets: Path, phase: str) -> str:
    """Address where an engine publishes every record."""
    return wire.ipc(sockets / f"all-{phase}.sock")


def run_instance(settings: EmulatorSettings, phase: str) -> None:
    """Serve one instance until a signal."""
    wire.socket_folder(settings.sockets)
    plant = settings.plant(phase)
    sender = Sender(
        wire.record_endpoint(settings.sockets, phase), all_records_endpoint(settings.sockets, phase)
    )
    if sender.dead:
        raise BiscaleError(
            f"cannot publish records in {settings.sockets}: is another emulation running there?"
        )

    async def main() -> None:
        engine = Instance(
            plant, FakeState(settings.state), settings.gpus(phase), sender, settings.member
        )
        with tuned_for_latency():
            await serve(
                EngineServer(engine, settings.max_model_len),
                settings.host,
                settings.ports[PHASES.index(phase)],
            )

    asyncio.run(main())


class Emulation:
    """Both engines as child processes; a context manager."""

    def __init__(self, settings: EmulatorSettings) -> None:
        """Make the fake GPUs and start both engines; returns when both answer.

        Raises:
            BiscaleError: a port or the file is taken, or the settings make no sense.
        """
        self.settings = settings
        settings.plant("prefill")  # mistakes are said here, not by a child
        self._held = hold(
            "emulation-"
            + hashlib.blake2b(os.fsencode(settings.state.absolute()), digest_size=16).hexdigest()
        )
        if self._held is None:  # its engines would go on with a file that nobody else sees any more
            raise BiscaleError(
                f"another emulation runs on the fake GPUs in {settings.state}: stop it or choose another --state"
            )
        create_state(settings.state, 2 * settings.tp, delay_s=settings.delay_s)
        self.children = [Child(f"emulated {phase}", settings.arguments(phase)) for phase in PHASES]
        try:
            for child in self.children:
                child.wait_for("ready at", 120)
        except BaseException:
            self.stop()
            raise

    @property
    def urls(self) -> tuple[str, str]:
        """Addresses of prefill and decode."""
        host, ports = self.settings.host, self.settings.ports
        return f"http://{host}:{ports[0]}", f"http://{host}:{ports[1]}"

    def wait(self) -> None:
        """Wait for a signal or for a child to end.

        Raises:
            BiscaleError: a child ended by itself.
        """
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: stop.set())
        while not stop.wait(0.3):
            for child in self.children:
                if not child.running:
                    raise BiscaleError(child.reason())

    def stop(self) -> None:
        """End both engines."""
        for child in self.children:
            child.stop()
        if self._held is not None:
            self._held.close()

    def __enter__(self) -> "Emulation":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
