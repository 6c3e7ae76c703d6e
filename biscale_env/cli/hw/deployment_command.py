"""``biscale hw keys | up | status | route``: a whole deployment from its file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biscale_env.core.errors import BiscaleError

if TYPE_CHECKING:
    from biscale_env.hardware.deploy.deployed_replay import DeployedOutcome
    from biscale_env.hardware.deploy.deployment_file import Deployment
    from biscale_env.traces import Trace

DeploymentName = Annotated[
    str, typer.Argument(help="Deployment: YAML file, or a name of configs/deployments.")
]
AtMachine = Annotated[
    str | None, typer.Option("--at", help="Machine whose keys are used; default: those found here.")
]


def register(group: typer.Typer) -> None:
    """Add the commands to ``hw``."""
    group.command("keys")(keys_command)
    group.command("up")(up_command)
    group.command("status")(status_command)
    group.command("route")(route_command)
    group.command("plan")(plan_command)


def keys_command(deployment: DeploymentName) -> None:
    """Make CurveZMQ keys for the machines of a deployment; existing ones are kept.

    Every machine gets a folder; copy it there, and nowhere else.
    """
    from biscale_env.hardware.deploy.deployment_file import load_deployment
    from biscale_env.hardware.remote.keyring import make_keys

    d = load_deployment(deployment)
    if d.keys is None:
        raise BiscaleError(f"{d.name} names no folder of keys: add 'keys: FOLDER' to it")
    for name, folder in zip(d.machines, make_keys(d.keys, list(d.machines)), strict=True):
        typer.echo(f"machine {name}: {folder}")


def up_command(
    deployment: DeploymentName,
    machine: Annotated[
        list[str] | None,
        typer.Option(help="Machine to bring up; repeatable; default: those with addresses here."),
    ] = None,
    logs: Annotated[
        Path | None, typer.Option(help="Folder of the logs; default in the machine's folder.")
    ] = None,
    observe_only: Annotated[bool, typer.Option(help="Decide and log, set no clock.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only check, start nothing.")] = False,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="With one --machine: only this part, 'actuator' or the controller of an instance; "
            "repeatable."
        ),
    ] = None,
    environment: Annotated[
        str | None,
        typer.Option(help="Print the variables that the engine of this instance is started with."),
    ] = None,
) -> None:
    """Check a deployment and start its actuator per machine and controller per instance.

    Until a signal; every clock is reset on any way out. On each machine of a real deployment.
    """
    from biscale_env.hardware.deploy.deployment_file import load_deployment, must_know
    from biscale_env.hardware.deploy.machine_agent import local_machines

    d = load_deployment(deployment)
    if environment is not None:
        if environment not in d.instances:
            raise BiscaleError(
                f"{d.name} has no instance '{environment}'; known: {', '.join(d.instances)}"
            )
        for name, value in d.engine_environment(environment).items():
            typer.echo(f"{name}={value}")
        return
    chosen = machine or local_machines(d)
    for name in chosen:
        must_know(d, name)
    if not chosen:
        known = ", ".join(f"{name} at {one.host}" for name, one in d.machines.items())
        raise BiscaleError(f"no machine of {d.name} has an address here: {known}; use --machine")
    if part and len(chosen) != 1:
        raise BiscaleError("--part belongs to one machine: give --machine too")
    if machine is None or check:
        _check(d, chosen)
    if check:
        return
    if len(chosen) == 1:
        folder = logs or d.home(chosen[0]) / "logs"
        _serve(d, chosen[0], folder, observe_only, part or [])
        return
    _serve_several(d, deployment, chosen, logs, observe_only)


def _check(deployment: "Deployment", machines: list[str]) -> None:
    """Policies of all instances, and the doctor on these machines."""
    from biscale_env.envs.plant import Plant, PlantSettings
    from biscale_env.hardware.deploy.machine_agent import doctor_lines
    from biscale_env.hardware.loop.recorded_policy import load_policy

    for name, one in deployment.instances.items():
        plant = Plant(PlantSettings.of(one.phase, instance=deployment.spec(name)))
        load_policy(deployment.policy(name), plant)
    for name in machines:
        if not deployment.on_machine(name):
            typer.echo(f"machine {name}: no GPUs of this deployment")
            continue
        found = doctor_lines(deployment, name)
        typer.echo(f"machine {name}: {found['ok']} findings are well, {found['warn']} to look at")
    for name in deployment.machines:
        if name not in machines:
            typer.echo(
                f"machine {name}: not here; run `biscale hw up` there, see `biscale hw status`"
            )


def _serve(
    deployment: "Deployment", machine: str, logs: Path, observe_only: bool, parts: list[str]
) -> None:
    """Run one machine until a signal."""
    from biscale_env.hardware.deploy.machine_agent import MachineAgent
    from biscale_env.hardware.loop.processes import until_signal

    ended = until_signal()
    agent = MachineAgent(deployment, machine, logs, observe_only, parts)
    agent.start(typer.echo)
    typer.echo(f"machine {machine} is up")
    try:
        while not ended.is_set():
            agent.turn()
    finally:
        said = agent.stop()
    if said:
        raise BiscaleError("; ".join(said))


def _serve_several(
    deployment: "Deployment", named: str, machines: list[str], logs: Path | None, observe_only: bool
) -> None:
    """Run a process per machine until a signal."""
    from biscale_env.hardware.loop.processes import Child, until_signal

    ended = until_signal()
    children = {}
    try:
        for name in machines:
            arguments = ["hw", "up", named, "--machine", name]
            arguments += ["--logs", str(logs / name)] if logs else []
            arguments += ["--observe-only"] if observe_only else []
            children[name] = Child(f"machine {name}", arguments)
        for name, child in children.items():
            child.wait_for(f"machine {name} is up", 300)
            typer.echo(f"machine {name} is up")
        typer.echo(f"{deployment.name} is up")
        while not ended.wait(0.3):
            for child in children.values():
                if not child.running:
                    raise BiscaleError(child.reason())
    finally:
        for child in children.values():
            child.stop(30)


def route_command(deployment: DeploymentName) -> None:
    """Serve the router of a deployment, with the simulator's policies, until a signal."""
    from biscale_env.hardware.deploy.deployment_file import load_deployment
    from biscale_env.hardware.deploy.emulated_deployment import run_router

    run_router(load_deployment(deployment))


def plan_command(
    deployment: DeploymentName,
    log: Annotated[Path | None, typer.Option(help="JSON lines of every placement.")] = None,
) -> None:
    """Run tier 1 of a deployment until a signal: placements by the load of the window before.

    `biscale hw up` starts it where the file has a section tier1.
    """
    from biscale_env.cli.hw.hw_options import log_to
    from biscale_env.hardware.deploy.deployment_file import load_deployment
    from biscale_env.hardware.deploy.tier1_loop import TURN_S, Tier1Loop
    from biscale_env.hardware.loop import wire
    from biscale_env.hardware.loop.processes import until_signal

    d = load_deployment(deployment)
    ended = until_signal()
    wire.socket_folder(d.home(d.tier1_machine))
    with log_to(log) as stream:
        loop = Tier1Loop(d, wire.socket_folder(d.sockets(d.tier1_machine)), stream, tell=typer.echo)
        typer.echo("tier 1 ready")
        try:
            while not ended.wait(TURN_S):
                loop.turn()
        finally:
            loop.close()


def status_command(
    deployment: DeploymentName,
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    at: AtMachine = None,
) -> None:
    """Show instances, clocks, queues, leases, energy and attainment, live."""
    from rich.console import Console
    from rich.live import Live

    from biscale_env.hardware.deploy.deployment_file import load_deployment
    from biscale_env.hardware.deploy.live_status import LOOK_S, StatusBoard

    board = StatusBoard.of(load_deployment(deployment), at)
    console = Console()
    try:
        board.look(1.5)
        if once:
            console.print(board.render())
            return
        with Live(board.render(), console=console, auto_refresh=False) as live:
            while True:
                board.look(LOOK_S)
                live.update(board.render(), refresh=True)
    except KeyboardInterrupt:
        pass
    finally:
        board.close()


def replay_deployment(
    named: str,
    at: str | None,
    trace: "Trace",
    out: Path,
    numbers: tuple[int, float, float],
    api_key: str | None,
) -> None:
    """Replay a trace on a deployment that is up, under a progress bar, and tell what came of it.

    ``numbers``: vocabulary; seconds of silence and of waiting for the router.
    """
    from biscale_env.cli.hw.replay_progress import replay_progress
    from biscale_env.hardware.deploy.deployed_replay import DeployedReplay, run_deployed_replay
    from biscale_env.hardware.deploy.deployment_file import load_deployment
    from biscale_env.hardware.replay.closed_loop import wait_for_engines

    deployment = load_deployment(named)
    vocabulary, stall_s, wait_s = numbers
    settings = DeployedReplay(
        deployment, at, vocabulary=vocabulary, stall_s=stall_s, api_key=api_key
    )
    wait_for_engines([deployment.router.url], wait_s, api_key)
    with replay_progress(len(trace)) as tell:
        done = run_deployed_replay(settings, trace, out, tell)
    _tell_replay(done)
    done.raise_trouble()


def _tell_replay(done: "DeployedOutcome") -> None:
    """Print the table of pools and what went wrong."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    names = ("pool", "instances", "sent", "failed", "P50", "P99", "SLO attainment", "energy")
    table = Table(*names, "per output token", title=str(done.out))
    for row in done.view.results.to_dict("records") if done.view is not None else ():
        metric = "ttft" if row["phase"] == "prefill" else "tpot"
        table.add_row(
            row["phase"],
            str(row["instances"]),
            str(len(done.raw.requests)),
            str(row["failed_requests"]),
            f"{row[f'{metric}_p50_s'] * 1e3:.1f} ms",
            f"{row[f'{metric}_p99_s'] * 1e3:.1f} ms",
            f"{row['attainment']:.2%}",
            f"{row['energy_j']:,.0f} J",
            f"{row['energy_per_output_token_j']:.3f} J",
        )
    console.print(table)
    for problem in done.problems:
        console.print(f"[yellow]{problem}[/]")
