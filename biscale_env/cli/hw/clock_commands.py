"""``biscale hw doctor | clock-latency | actuate | restore``: the clocks of GPUs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from biscale_env.cli.hw.hw_options import (
    SOCKETS,
    ApiKey,
    Backend,
    GpuSets,
    GpuSpec,
    Keys,
    Lease,
    Means,
    Sockets,
    clock_bounds,
    log_to,
    open_log,
    parse_groups,
)
from biscale_env.cli.hw.settings_file import SettingsFile


def register(group: typer.Typer) -> None:
    """Add the commands to ``hw``."""
    group.command("doctor")(doctor_command)
    group.command("clock-latency")(clock_latency_command)
    group.command("actuate")(actuate_command)
    group.command("restore")(restore_command)


def doctor_command(
    backend: Backend = "nvml",
    endpoint: Annotated[
        list[str] | None, typer.Option(help="Engine address to try; repeatable.")
    ] = None,
    api_key: ApiKey = None,
) -> None:
    """Show GPUs, clocks, privileges and engines, and what will not work and why.

    Changes nothing.
    """
    from rich.console import Console
    from rich.table import Column, Table

    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.clocks.doctor import examine

    findings = examine(backend, endpoint or [], api_key)
    table = Table("", Column("what", overflow="fold"), "finding", title="biscale hw doctor")
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]look[/]", "fail": "[red]no[/]"}
    for finding in findings:
        table.add_row(marks[finding.status], finding.subject, finding.text)
    Console().print(table)
    failed = [f for f in findings if f.status == "fail"]
    if failed:
        raise BiscaleError(f"{failed[0].subject}: {failed[0].text}")


def clock_latency_command(
    *,
    backend: Backend = "nvml",
    gpu: Annotated[str, typer.Option(help="Index or UUID; keep this GPU busy meanwhile.")] = "0",
    clocks: Annotated[
        int, typer.Option(help="Clocks spread over the range; all ordered pairs are measured.")
    ] = 4,
    repeats: Annotated[int, typer.Option(help="Times every pair is measured.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write every change as CSV.")] = None,
    into: Annotated[
        Path | None,
        typer.Option(help="Coefficient folder of `biscale fit` to write the delays into."),
    ] = None,
    gpu_spec: GpuSpec = None,
) -> None:
    """Measure how long a clock change takes here; locks and resets the clock of one GPU."""
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.clocks import change_latency
    from biscale_env.hardware.clocks.backend_registry import open_backend
    from biscale_env.hardware.clocks.caller import as_caller

    if clocks < 2 or repeats < 1:
        raise BiscaleError("--clocks must be at least 2 and --repeats at least 1")
    if (table := open_log(out)) is not None:  # said before anything is measured
        table.close()
    if into:
        change_latency.family_files(into)
    low, high = clock_bounds(gpu_spec)
    with open_backend(backend) as device:
        uuid = device.device(gpu).uuid
        usable = change_latency.within(device.supported_mhz(uuid), low, high)
        pairs = change_latency.pairs_of(usable, clocks)
        found = change_latency.measure(device, backend, uuid, pairs, repeats, tell=_tell_switch)
    summary = change_latency.summarise(found)
    _tell_latency(len(found), summary)
    with as_caller():
        if out:
            change_latency.as_frame(found).to_csv(out, index=False)
        for path in change_latency.write_delays(into, found) if into else []:
            typer.echo(f"delays written into {path}")
    if not into:
        typer.echo(
            f"use it: --delay {summary['seen_median_s']:.3f}, "
            "or write it into your fitted models with --into FOLDER"
        )


def _tell_latency(count: int, summary: "dict[str, float]") -> None:
    typer.echo(
        f"{count} changes: driver call median {summary['call_median_s'] * 1e3:.2f} ms, "
        f"P99 {summary['call_p99_s'] * 1e3:.2f} ms; clock seen after "
        f"median {summary['seen_median_s'] * 1e3:.1f} ms, "
        f"P99 {summary['seen_p99_s'] * 1e3:.1f} ms ({summary['seen_share']:.0%} seen)"
    )


def _tell_switch(switch: object) -> None:
    from biscale_env.hardware.clocks.change_latency import Switch

    assert isinstance(switch, Switch)
    typer.echo(
        f"{switch.from_mhz:6g} -> {switch.to_mhz:6g} MHz: call {switch.call_s * 1e3:6.2f} ms, "
        f"seen {switch.seen_s * 1e3:6.1f} ms"
    )


def actuate_command(
    *,
    gpus: GpuSets,
    backend: Backend = "nvml",
    sockets: Sockets = SOCKETS,
    observe_only: Annotated[bool, typer.Option(help="Log what would be set, set nothing.")] = False,
    lease: Lease = 1.5,
    hot: Annotated[
        float, typer.Option(help="Degrees Celsius above which clocks are not raised.")
    ] = 85.0,
    lower_bound: Annotated[
        str, typer.Option(help="fixed locks (f, f), cap locks (lowest, f).")
    ] = "fixed",
    means: Means = "lock",
    gpu_spec: GpuSpec = None,
    instance: Annotated[
        Path | None,
        typer.Option(help="YAML description of the instance, for the range of its GPU."),
    ] = None,
    freq_min: Annotated[
        float | None, typer.Option(help="Lowest clock ever set, MHz; narrows the range.")
    ] = None,
    freq_max: Annotated[
        float | None, typer.Option(help="Highest clock ever set, MHz; narrows the range.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="JSON lines of every clock change with all time stamps.")
    ] = None,
    commands: Annotated[
        str | None,
        typer.Option(help="Take commands of other machines too, at this tcp://HOST:PORT."),
    ] = None,
    status: Annotated[
        str | None, typer.Option(help="Where other machines hear of clocks, tcp://HOST:PORT.")
    ] = None,
    keys: Keys = None,
    settings: SettingsFile = None,
) -> None:
    """Own the clocks, or the power limits, of these GPUs until a signal; needs root with NVML.

    All are reset on any way out.
    """
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.clocks.backend_registry import open_backend
    from biscale_env.hardware.loop.actuator import Actuator
    from biscale_env.hardware.loop.actuator_process import serve
    from biscale_env.hardware.loop.gpu_group import ActuatorConfig
    from biscale_env.hardware.remote.command_desk import DeskSettings

    if (commands is None) != (status is None):
        raise BiscaleError("--commands and --status go together: give both addresses or none")
    if means == "cap" and not (freq_min is None and freq_max is None):
        raise BiscaleError(
            "--freq-min and --freq-max cannot be kept by power limits: leave them out, or use "
            "--means lock"
        )
    low, high = clock_bounds(gpu_spec, instance)
    low = low if freq_min is None else max(low or 0.0, freq_min)
    high = high if freq_max is None else min(high or math.inf, freq_max)
    config = ActuatorConfig(
        groups=parse_groups(gpus),
        sockets=sockets,
        backend=backend,
        freq_min_mhz=low,
        freq_max_mhz=high,
        lease_s=lease,
        hot_c=hot,
        lower_bound=lower_bound,
        means=means,
        desk=DeskSettings(commands, status, keys) if commands and status else None,
    )
    with open_backend(backend, observe_only) as device, log_to(log) as stream:
        serve(Actuator(config, device, stream, realtime=True))


def restore_command(
    deployment: Annotated[
        str | None,
        typer.Argument(help="Deployment: on every machine of it that has its address here."),
    ] = None,
    backend: Backend = "nvml",
    all_gpus: Annotated[
        bool, typer.Option("--all", help="Reset every GPU of the backend, recorded or not.")
    ] = False,
    means: Annotated[
        str,
        typer.Option(
            help="With --all, what is taken back of GPUs that nobody has recorded: lock or cap."
        ),
    ] = "lock",
) -> None:
    """Reset every clock, or power limit, that an earlier run of ours may have left.

    Every GPU is tried and reported; exit code 2 when one could not be reset.
    """
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.clocks import owner
    from biscale_env.hardware.clocks.backend_registry import open_backend
    from biscale_env.hardware.clocks.means import by_means

    restore: Callable[..., list[owner.Recovery]] = owner.restore_all if all_gpus else owner.recover
    outcomes = []
    for name in [backend] if deployment is None else _backends_here(deployment):
        with open_backend(name) as device:
            outcomes += restore(by_means(device, means), name)
    for outcome in outcomes:
        typer.echo(f"{outcome.uuid}: {outcome.text}")
    if not outcomes:
        typer.echo("nothing to restore: no clock was left locked by us")
    failed = [outcome for outcome in outcomes if outcome.failed]
    if failed:
        raise BiscaleError(
            f"{len(failed)} of {len(outcomes)} clocks could not be reset, "
            f"the first is {failed[0].uuid}: see above"
        )


def _backends_here(named: str) -> list[str]:
    """Clock backends of the machines of a deployment that are this computer."""
    from biscale_env.hardware.deploy.deployment_file import load_deployment
    from biscale_env.hardware.deploy.machine_agent import local_machines

    deployment = load_deployment(named)
    machines = [name for name in local_machines(deployment) if deployment.on_machine(name)]
    return list(dict.fromkeys(deployment.backend(name) for name in machines))
