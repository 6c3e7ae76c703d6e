"""`biscale hw emulate`: fake GPUs and two emulated engines, prefill and decode, as processes."""

import asyncio
import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

from biscale_env.config import Gpu, InstanceSpec
from biscale_env.config.slo import one_bound
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.clocks.fake_gpus import FakeState, create_state
from biscale_env.hardware.clocks.owner import hold
from biscale_env.hardware.emulation.emulator import Instance
from biscale_env.hardware.emulation.emulator_http import EngineServer, ready_line, serve
from biscale_env.hardware.engines.engine_instance import ENGINE_INSTANCE
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.processes import Child, tuned_for_latency, wait_with

PHASES = ("prefill", "decode")
DRIVER_MIN_MHZ = 345.0  # lowest clock that an H100's driver lists


@dataclass(frozen=True)
class EmulatorSettings:
    """What is emulated.

    Attributes:
        state: file of the fake GPUs; prefill takes the first ``tp``, decode the next.
        sockets: folder of the record sockets.
        host: address to listen at.
        ports: port per phase.
        instance: GPU, LLM, model and limits of either engine.
        max_model_len: context length.
        delay_s: actuation delay of the fake GPUs, s.
        member: ensemble member of the emulated plant.
        asynchronous: the engines schedule asynchronously.
    """

    state: Path
    sockets: Path
    host: str = "127.0.0.1"
    ports: tuple[int, int] = (8100, 8200)
    instance: InstanceSpec = ENGINE_INSTANCE
    max_model_len: int = 16_384
    delay_s: float = 0.05
    member: int = -1
    asynchronous: bool = False

    def plant(self, phase: str) -> Plant:
        """Plant of one instance."""
        settings = PlantSettings.of(
            phase,
            instance=self.instance,
            actuation_delay_s=self.delay_s,
            ensemble_member=self.member,
        )
        plant = Plant(settings)
        one_bound(plant.slo, "an emulated engine")
        return plant

    def gpus(self, phase: str) -> list[int]:
        """Fake GPUs of one instance."""
        first = 0 if phase == "prefill" else self.instance.tp
        return list(range(first, first + self.instance.tp))

    def url(self, phase: str) -> str:
        """Address of one engine."""
        return f"http://{self.host}:{self.ports[PHASES.index(phase)]}"

    def file(self, name: str) -> Path:
        """A file of the emulation, beside that of its fake GPUs."""
        return self.state.with_name(f"{self.state.name}-{name}.yaml")

    def options(self, phase: str) -> dict[str, object]:
        """Options of the process of one instance, for its settings file."""
        return {
            "phase": phase,
            "state": str(self.state),
            "sockets": str(self.sockets),
            "host": self.host,
            "prefill_port": self.ports[0],
            "decode_port": self.ports[1],
            "instance": str(self.file("instance")),
            "max_model_len": self.max_model_len,
            "delay": self.delay_s,
            "member": self.member,
            "async_scheduling": self.asynchronous,
        }


def machine_limits_mhz(gpu: Gpu) -> tuple[float, float, float]:
    """Lowest and highest clock and step of the pretended machine.

    As a real driver it goes lower than what is controlled: to :data:`DRIVER_MIN_MHZ` at least.
    """
    steps = math.floor((gpu.freq_max_mhz - DRIVER_MIN_MHZ) / gpu.freq_step_mhz)
    low = gpu.freq_max_mhz - gpu.freq_step_mhz * max(steps, 0)
    return min(low, gpu.freq_min_mhz), gpu.freq_max_mhz, gpu.freq_step_mhz


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
            plant,
            FakeState(settings.state),
            settings.gpus(phase),
            sender,
            settings.member,
            settings.asynchronous,
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
        gpu = settings.plant("prefill").gpu  # mistakes are said here, not by a child
        self._held = hold(
            "emulation-"
            + hashlib.blake2b(os.fsencode(settings.state.absolute()), digest_size=16).hexdigest()
        )
        if self._held is None:  # its engines would go on with a file that nobody else sees any more
            raise BiscaleError(
                f"another emulation runs on the fake GPUs in {settings.state}: "
                "stop it or choose another --state"
            )
        limits_mhz = machine_limits_mhz(gpu)
        create_state(
            settings.state,
            2 * settings.instance.tp,
            delay_s=settings.delay_s,
            limits_mhz=limits_mhz,
        )
        settings.instance.to_yaml(settings.file("instance"))
        self.children: list[Child] = []
        try:
            for phase in PHASES:
                options, file = settings.options(phase), settings.file(phase)
                child = Child.with_settings(f"emulated {phase}", ("hw", "emulate"), options, file)
                self.children.append(child)
            for phase, child in zip(PHASES, self.children, strict=True):
                child.wait_for(ready_line(phase, settings.url(phase)), 120)
        except BaseException:
            self.stop()
            raise

    @property
    def urls(self) -> tuple[str, str]:
        """Addresses of prefill and decode."""
        prefill, decode = (self.settings.url(phase) for phase in PHASES)
        return prefill, decode

    def wait(self) -> None:
        """Wait for a signal or for a child to end.

        Raises:
            BiscaleError: a child ended by itself.
        """
        wait_with(self.children)

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
