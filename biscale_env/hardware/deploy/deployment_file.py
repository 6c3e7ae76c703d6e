"""The deployment file: machines, instances, router, policies, bounds and SLO, said once.

``biscale hw keys | up | status | emulate | restore`` and ``biscale replay --deployment`` read it.
Every machine reads the same file; addresses and folders follow from it.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from biscale_env.config import InstanceSpec, WithInstance
from biscale_env.config.loader import Config, configs_dir, find_named, load_yaml
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Means
from biscale_env.hardware.engines.engine_instance import ENGINE_MAX_SEQS
from biscale_env.hardware.engines.hook.curve import next_port
from biscale_env.hardware.loop import wire
from biscale_env.hardware.remote.channels import is_loopback

EMULATED = "emulated"  # backend: fake GPUs that `biscale hw emulate` makes in the machine's folder
# the simulator's routers but cache_aware: prompts come as tokens, whose prefixes are not known here
Spread = Literal["weighted", "round_robin", "shortest", "what_if"]
NAME = r"^[a-z][a-z0-9_]*$"
MACHINE_NAME = r"^[a-z0-9][a-z0-9._-]*$"  # as nodes of Kubernetes are named
HIGHEST_PORT = 65535
BISCALE: dict[Literal["prefill", "decode"], str] = {"prefill": "mpc", "decode": "slack"}


class Machine(Config):
    """One machine with GPUs.

    Attributes:
        host: address at which the other machines reach it.
        listen: address that its processes listen at; None: ``host``.
        backend: clock backend, ``nvml``, ``zeusd[:SOCKET]``, ``fake:STATE_FILE`` or ``emulated``.
        emulated_gpus: fake GPUs of an emulated machine.
        commands_port: of the actuator's commands.
        status_port: of its beacons and clock changes.
        feed_port: of what `hw status` and `replay` follow.
        records_port: first of the ports at which records of engines on other machines are taken;
            two per instance.
    """

    host: str = "127.0.0.1"
    listen: str | None = None
    backend: str = "nvml"
    emulated_gpus: int = Field(default=8, gt=0, le=64)
    commands_port: int = Field(default=20510, gt=0, le=HIGHEST_PORT)
    status_port: int = Field(default=20511, gt=0, le=HIGHEST_PORT)
    feed_port: int = Field(default=20512, gt=0, le=HIGHEST_PORT)
    records_port: int = Field(default=20600, gt=0, le=HIGHEST_PORT - 128)

    @property
    def needs_keys(self) -> bool:
        """Whether it is reached from beyond itself."""
        return not (is_loopback(self.host) and is_loopback(self.listen or self.host))


class DeployedInstance(Config):
    """One engine instance.

    Attributes:
        phase: ``prefill`` or ``decode``.
        machine: where its GPUs are.
        gpus: its GPUs (index or UUID); their number is its tensor parallel degree.
        engine: address of the engine, ``http://host:port``.
        records: address at which its controller takes its records, ``tcp://host:port``, where it
            runs on another machine; None: chosen from that machine's ``records_port``.
        policy: its policy; None: that of its phase.
        instance: what differs from the deployment's instance, keys of
            :class:`~biscale_env.config.InstanceSpec`.
    """

    phase: Literal["prefill", "decode"]
    machine: str
    gpus: tuple[int | str, ...] = Field(min_length=1)
    engine: str = Field(pattern=r"^https?://[^/]+:\d+(/v1)?/?$")
    records: str | None = Field(default=None, pattern=r"^tcp://.+:\d+$")
    policy: str | None = None
    instance: dict[str, Any] = Field(default_factory=dict)


class RouterSettings(Config):
    """What spreads requests over the instances.

    Attributes:
        url: where requests are sent.
        kind: ``biscale``: our own, with the simulator's policies; ``proxy``: somebody else's, of
            whose choices nothing is known.
        prefill: how requests are spread over prefill instances.
        decode: how they are spread over decode instances.
    """

    url: str = Field(default="http://127.0.0.1:8000", pattern=r"^https?://[^/]+:\d+/?$")
    kind: Literal["biscale", "proxy"] = "biscale"
    prefill: Spread = "shortest"
    decode: Spread = "shortest"


class ClockBounds(Config):
    """What every actuator keeps.

    Attributes:
        freq_min_mhz: lowest clock ever set; None: the lowest of the instance's GPU.
        freq_max_mhz: highest clock ever set; None: the highest of it.
        lease_s: clocks go back without a living controller for so long.
        hot_c: degrees above which clocks are not raised.
        delay_s: expected actuation delay; None: the model's.
        means: how clocks are held: ``lock``, or ``cap`` where only the power may be limited.
    """

    freq_min_mhz: float | None = Field(default=None, gt=0)
    freq_max_mhz: float | None = Field(default=None, gt=0)
    lease_s: float = Field(default=1.5, ge=0.1, le=10)
    hot_c: float = Field(default=85.0, gt=0)
    delay_s: float | None = Field(default=None, ge=0)
    means: Means = "lock"


class Tier1Settings(Config):
    """The placement programme in the loop.

    Attributes:
        window_s: how often it is solved; the forecast is the load of the window before.
        alpha: headroom over the forecast.
        rate_rps: forecast of the first window; None: all instances serve until there is one.
        adapter: who carries instance counts out: ``advise`` only logs them, ``router`` opens and
            drains instances of this deployment, ``kubernetes`` and ``dynamo`` scale workloads.
        namespace: of Kubernetes.
        workloads: per phase, what is scaled: ``statefulset/NAME`` or ``deployment/NAME`` with
            ``kubernetes``, the service's name in the graph with ``dynamo``.
        graph: with ``dynamo``, name of the DynamoGraphDeployment.
    """

    window_s: float = Field(default=300.0, gt=0)
    alpha: float = Field(default=0.1, gt=-1)
    rate_rps: float | None = Field(default=None, gt=0)
    adapter: Literal["advise", "router", "kubernetes", "dynamo"] = "advise"
    namespace: str = "default"
    workloads: dict[Literal["prefill", "decode"], str] = Field(default_factory=dict)
    graph: str | None = None

    @model_validator(mode="after")
    def _names_what_it_scales(self) -> "Tier1Settings":
        if self.adapter in ("kubernetes", "dynamo"):
            missing = [phase for phase in ("prefill", "decode") if phase not in self.workloads]
            if missing:
                raise ValueError(f"adapter {self.adapter} needs workloads.{missing[0]}")
        if self.adapter == "dynamo" and self.graph is None:
            raise ValueError("adapter dynamo needs graph, the DynamoGraphDeployment's name")
        return self


class Deployment(WithInstance):
    """Everything that serves and controls one model.

    Attributes:
        name: short name.
        folder: sockets, logs and emulated GPUs of each machine lie in ``folder/MACHINE``; relative
            to the file.
        keys: parent of the machines' key folders; None: no keys, every machine on loopback.
        machines: by name.
        instances: by name.
        router: what spreads requests.
        policies: per phase.
        controllers: ``beside`` the engines, or the machine where all of them run.
        bounds: of all clocks.
        tier1: the placement programme; None: the instances stay as they are.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    folder: Path = Path("/tmp/biscale")
    keys: Path | None = None
    machines: dict[str, Machine] = Field(min_length=1)
    instances: dict[str, DeployedInstance] = Field(min_length=1)
    router: RouterSettings = RouterSettings()
    policies: dict[Literal["prefill", "decode"], str] = Field(default_factory=lambda: dict(BISCALE))
    controllers: str = "beside"
    bounds: ClockBounds = ClockBounds()
    tier1: Tier1Settings | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_engines_are(cls, data: Any) -> Any:
        """The batch limit of vLLM where none is given."""
        if isinstance(data, dict) and isinstance(data.get("instance", {}), dict):
            given = {"max_seqs": ENGINE_MAX_SEQS, **data.get("instance", {})}
            return {**data, "instance": given}
        return data

    @field_validator("machines")
    @classmethod
    def _usable_machines(cls, value: dict[str, Machine]) -> dict[str, Machine]:
        for name in value:
            if not re.match(MACHINE_NAME, name):
                raise ValueError(f"name '{name}': use small letters, digits, '.', '-' and '_'")
        return value

    @field_validator("instances")
    @classmethod
    def _usable_instances(cls, value: dict[str, DeployedInstance]) -> dict[str, DeployedInstance]:
        for name in value:
            if not re.match(NAME, name):
                raise ValueError(f"name '{name}': use small letters, digits and _")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "Deployment":
        for name, one in self.instances.items():
            if one.machine not in self.machines:
                known = ", ".join(self.machines)
                raise ValueError(f"instance '{name}' is on machine '{one.machine}'; known: {known}")
            try:
                self.spec(name)
            except BiscaleError as error:
                raise ValueError(f"instance '{name}': {error}") from None
        if self.controllers != "beside" and self.controllers not in self.machines:
            raise ValueError(f"controllers: '{self.controllers}' is neither 'beside' nor a machine")
        phases = {one.phase for one in self.instances.values()}
        if len(phases) < len(("prefill", "decode")):
            raise ValueError("a deployment needs prefill and decode instances")
        self._nothing_twice()
        if self.keys is None:
            for name, machine in self.machines.items():
                if machine.needs_keys:
                    raise ValueError(f"machine '{name}' at {machine.host} is reached without keys")
        return self

    def _nothing_twice(self) -> None:
        gpus = Counter((o.machine, str(g)) for o in self.instances.values() for g in o.gpus)
        for (machine, gpu), count in gpus.items():
            if count > 1:
                raise ValueError(f"GPU {gpu} of machine '{machine}' is in {count} instances")
        for machine, count in Counter(self.addresses()).items():
            if count > 1:
                raise ValueError(f"{machine} is given to {count} listeners")

    # --- instances ---

    def spec(self, name: str) -> InstanceSpec:
        """What one instance is.

        Raises:
            BiscaleError: its own keys make no sense.
        """
        one = self.instances[name]
        return self.instance.changed(**{**one.instance, "tp": len(one.gpus)})

    def policy(self, name: str) -> str:
        """Policy of one instance; ``max`` where nothing is said."""
        one = self.instances[name]
        return one.policy or self.policies.get(one.phase, "max")

    def of_phase(self, phase: str) -> list[str]:
        """Names of the instances of a phase, in the order of the file."""
        return [name for name, one in self.instances.items() if one.phase == phase]

    def on_machine(self, machine: str) -> list[str]:
        """Names of the instances whose GPUs a machine has."""
        return [name for name, one in self.instances.items() if one.machine == machine]

    def controller_machine(self, name: str) -> str:
        """Where the controller of an instance runs."""
        return self.instances[name].machine if self.controllers == "beside" else self.controllers

    def controlled_by(self, machine: str) -> list[str]:
        """Names of the instances whose controllers run on a machine."""
        return [name for name in self.instances if self.controller_machine(name) == machine]

    @property
    def tier1_machine(self) -> str:
        """Where tier 1 runs: with the controllers, or on the first machine."""
        return next(iter(self.machines)) if self.controllers == "beside" else self.controllers

    # --- folders and addresses ---

    def home(self, machine: str) -> Path:
        """Folder of one machine."""
        return self.folder / machine

    def sockets(self, machine: str) -> Path:
        """Socket folder of one machine."""
        return self.home(machine) / "s"

    def key_folder(self, machine: str) -> Path | None:
        """Folder of one machine's keys."""
        return None if self.keys is None else self.keys / machine

    def backend(self, machine: str) -> str:
        """Clock backend of one machine, as :func:`open_backend` takes it."""
        backend = self.machines[machine].backend
        return f"fake:{self.home(machine) / 'gpus'}" if backend == EMULATED else backend

    def address(self, machine: str, what: Literal["commands", "status", "feed"]) -> str:
        """Address at which others call a machine."""
        one = self.machines[machine]
        return f"tcp://{one.host}:{getattr(one, f'{what}_port')}"

    def listens(self, machine: str, address: str) -> str:
        """An address of a machine, as its own process listens at it."""
        one = self.machines[machine]
        return f"tcp://{one.listen or one.host}:{address.rpartition(':')[2]}"

    def records(self, name: str) -> str:
        """Address at which the controller of an instance takes its records."""
        one, where = self.instances[name], self.controller_machine(name)
        if one.records is not None:
            return one.records
        if where == one.machine:
            return wire.record_endpoint(self.sockets(where), name)
        first = self.machines[where].records_port
        port = first + 2 * list(self.instances).index(name)
        return f"tcp://{self.machines[where].host}:{port}"

    def all_records(self, name: str) -> str:
        """Address where the engine of an instance publishes every record, on its machine."""
        sockets = self.sockets(self.instances[name].machine)
        return wire.ipc(sockets / f"all-{name}.sock")

    def engine_environment(self, name: str) -> dict[str, str]:
        """Environment variables that the engine of an instance is started with."""
        found = {
            "BISCALE_RECORDS": self.records(name),
            "BISCALE_RECORDS_ALL": self.all_records(name),
        }
        keys = self.key_folder(self.instances[name].machine)
        if keys is not None and found["BISCALE_RECORDS"].startswith("tcp://"):
            found |= {
                "BISCALE_KEYS": str(keys),
                "BISCALE_KEYS_PEER": self.controller_machine(name),
            }
        return found

    def addresses(self) -> list[str]:
        """Everything that is listened at over TCP."""
        found = [
            self.address(machine, what)
            for machine in self.machines
            for what in ("commands", "status", "feed")
        ]
        for name in self.instances:
            records = self.records(name)
            if records.startswith("tcp://"):
                found += [records, next_port(records)]
        urls = [one.engine for one in self.instances.values()] + [self.router.url]
        return found + [f"tcp://{url.split('/')[2]}" for url in urls]


def load_deployment(name: str) -> Deployment:
    """Load a shipped deployment (``configs/deployments``) or a YAML file.

    Relative folders of a file are relative to it; those of a shipped one to the current folder.

    Raises:
        BiscaleError: no such name, or something in it does not fit together.
    """
    path = find_named("deployments", name)
    deployment = load_yaml(path, Deployment)
    shipped = path.resolve().parent == (configs_dir() / "deployments").resolve()
    base = Path.cwd() if shipped else path.resolve().parent
    keys = None if deployment.keys is None else base / deployment.keys
    return deployment.model_copy(update={"folder": base / deployment.folder, "keys": keys})


def must_know(deployment: Deployment, machine: str) -> None:
    """Refuse a machine that the deployment does not have.

    Raises:
        BiscaleError: names the known ones.
    """
    if machine not in deployment.machines:
        known = ", ".join(deployment.machines)
        raise BiscaleError(f"{deployment.name} has no machine '{machine}'; known: {known}")
