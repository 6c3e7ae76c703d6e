"""`biscale hw emulate DEPLOYMENT`: its engines and router, emulated, in real time."""

import asyncio
import hashlib
import os
from urllib.parse import urlsplit

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.clocks.fake_gpus import FakeState, create_state
from biscale_env.hardware.clocks.owner import hold
from biscale_env.hardware.deploy.deployment_file import EMULATED, Deployment
from biscale_env.hardware.deploy.router_http import serve_router
from biscale_env.hardware.emulation.emulate import machine_limits_mhz
from biscale_env.hardware.emulation.emulator import Instance
from biscale_env.hardware.emulation.emulator_http import EngineServer, ready_line, serve
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.processes import Child, tuned_for_latency, wait_with

MAX_MODEL_LEN = 16_384
DELAY_S = 0.05  # actuation delay of the fake GPUs where bounds.delay_s does not say
START_S = 240.0  # engines start side by side, on few cores, with kernels to compile
ROUTER = "router"


def plant_of(deployment: Deployment, name: str, member: int = -1) -> Plant:
    """Plant of one emulated instance."""
    return Plant(
        PlantSettings.of(
            deployment.instances[name].phase,
            instance=deployment.spec(name),
            actuation_delay_s=delay_s(deployment),
            ensemble_member=member,
        )
    )


def delay_s(deployment: Deployment) -> float:
    """Actuation delay of the fake GPUs, s."""
    given = deployment.bounds.delay_s
    return DELAY_S if given is None else given


def must_be_emulated(deployment: Deployment) -> None:
    """Refuse to emulate engines of real GPUs.

    Raises:
        BiscaleError: a machine has real ones, or an instance is not on fake GPUs by number.
    """
    for name, machine in deployment.machines.items():
        if machine.backend != EMULATED:
            raise BiscaleError(
                f"machine '{name}' of {deployment.name} has backend '{machine.backend}': only "
                "machines with backend 'emulated' can be emulated"
            )
    for name, one in deployment.instances.items():
        there = deployment.machines[one.machine].emulated_gpus
        bad = [gpu for gpu in one.gpus if not (isinstance(gpu, int) and 0 <= gpu < there)]
        if bad:
            raise BiscaleError(
                f"instance '{name}': machine '{one.machine}' has emulated GPUs 0 to {there - 1}, "
                f"not {bad[0]}"
            )


def run_engine(deployment: Deployment, name: str, member: int = -1) -> None:
    """Serve one emulated engine until a signal.

    Raises:
        BiscaleError: its records cannot be sent, or its port is taken.
    """
    must_be_emulated(deployment)
    one = deployment.instances[name]
    wire.socket_folder(deployment.sockets(one.machine))
    os.environ.update(deployment.engine_environment(name))
    plant = plant_of(deployment, name, member)
    sender = Sender(deployment.records(name), deployment.all_records(name))
    if sender.dead:
        raise BiscaleError(
            f"cannot send the records of {name} to {deployment.records(name)}: is another "
            "emulation running in this folder, or are there no keys (`biscale hw keys`)?"
        )
    state = FakeState(deployment.home(one.machine) / "gpus")
    gpus = [int(gpu) for gpu in one.gpus]

    async def main() -> None:
        engine = Instance(plant, state, gpus, sender, member)
        where = urlsplit(one.engine)
        with tuned_for_latency():
            server = EngineServer(engine, MAX_MODEL_LEN)
            await serve(server, str(where.hostname), int(where.port or 80))

    asyncio.run(main())


def run_router(deployment: Deployment) -> None:
    """Serve the router until a signal.

    Raises:
        BiscaleError: it is somebody else's, or its port is taken.
    """
    if deployment.router.kind != "biscale":
        raise BiscaleError(
            f"the router of {deployment.name} is of kind '{deployment.router.kind}', not ours"
        )
    with tuned_for_latency():
        asyncio.run(serve_router(deployment))


class EmulatedDeployment:
    """All engines and the router as child processes; a context manager."""

    def __init__(self, deployment: Deployment, named: str, member: int = -1) -> None:
        """Make the fake GPUs and start everything; returns when all answer.

        Args:
            deployment: what is emulated.
            named: its name or file, for the children.
            member: ensemble member of the emulated plants.

        Raises:
            BiscaleError: a port or the folder is taken, or it is no emulated deployment.
        """
        must_be_emulated(deployment)
        self.deployment = deployment
        first = plant_of(deployment, next(iter(deployment.instances)), member)
        folder = os.fsencode(deployment.folder.absolute())
        self._held = hold(f"emulation-{hashlib.blake2b(folder, digest_size=16).hexdigest()}")
        if self._held is None:
            raise BiscaleError(f"another emulation runs in {deployment.folder}: stop it")
        for name, machine in deployment.machines.items():
            wire.socket_folder(deployment.folder)
            wire.socket_folder(deployment.home(name))
            create_state(
                deployment.home(name) / "gpus",
                machine.emulated_gpus,
                delay_s=delay_s(deployment),
                limits_mhz=machine_limits_mhz(first.gpu),
            )
        self.children: dict[str, Child] = {}
        try:
            parts = [*deployment.instances, ROUTER]
            if deployment.router.kind != "biscale":
                parts.remove(ROUTER)
            for part in parts:
                arguments = ["hw", "emulate", named, "--only", part, "--member", str(member)]
                self.children[part] = Child(f"emulated {part}", arguments)
            for part, child in self.children.items():
                child.wait_for(self._ready(part), START_S)
        except BaseException:
            self.stop()
            raise

    def _ready(self, part: str) -> str:
        if part == ROUTER:
            return f"router ready at {self.deployment.router.url}"
        one = self.deployment.instances[part]
        return ready_line(one.phase, one.engine.rstrip("/").removesuffix("/v1"))

    def wait(self) -> None:
        """Wait for a signal or for a child to end.

        Raises:
            BiscaleError: a child ended by itself.
        """
        wait_with(self.children.values())

    def stop(self) -> None:
        """End all of them."""
        for child in self.children.values():
            child.stop()
        if self._held is not None:
            self._held.close()

    def __enter__(self) -> "EmulatedDeployment":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
