"""``biscale hw``: real GPUs and engines.

What works here, how fast clocks change, the actuator, the controllers, the emulated engines, and
resetting clocks after a crash.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biscale_env.cli import profile_command, replay_command
from biscale_env.cli.hw_options import (
    SOCKETS,
    Backend,
    Dtype,
    GpuSets,
    GpuSpec,
    Instance,
    MaxSeqs,
    Model,
    Phase,
    Sockets,
    TokenBudget,
    Tp,
    clock_bounds,
    instance_of,
    log_to,
    need_hardware,
    open_log,
    parse_groups,
)
from biscale_env.cli.instance_options import EpDegree, GpuName, LlmName
from biscale_env.cli.settings_file import SettingsFile

if TYPE_CHECKING:
    from biscale_env.hardware.emulation.emulate import EmulatorSettings
    from biscale_env.hardware.loop.control import PowerMeter

group = typer.Typer(
    no_args_is_help=True, help="Real GPUs and engines: check, measure, actuate, emulate, restore."
)


def register(app: typer.Typer) -> None:
    """Add the ``hw`` group and the commands that use it."""
    app.add_typer(group, name="hw")
    replay_command.register(app)
    profile_command.register(app)


@group.callback()
def prepare(context: typer.Context) -> None:
    """Real GPUs and engines: check, measure, actuate, emulate, restore."""
    if context.invoked_subcommand == "doctor":  # which says itself which package is missing
        from biscale_env.core.platforms import need_linux

        need_linux("the hardware commands")
    else:
        need_hardware()


@group.command("doctor")
def doctor_command(
    backend: Backend = "nvml",
    endpoint: Annotated[
        list[str] | None, typer.Option(help="Engine address to try; repeatable.")
    ] = None,
) -> None:
    """Show GPUs, clocks, privileges and engines, and what will not work and why.

    Changes nothing.
    """
    from rich.console import Console
    from rich.table import Column, Table

    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.clocks.doctor import examine

    findings = examine(backend, endpoint or [])
    table = Table("", Column("what", overflow="fold"), "finding", title="biscale hw doctor")
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]look[/]", "fail": "[red]no[/]"}
    for finding in findings:
        table.add_row(marks[finding.status], finding.subject, finding.text)
    Console().print(table)
    failed = [f for f in findings if f.status == "fail"]
    if failed:
        raise BiscaleError(f"{failed[0].subject}: {failed[0].text}")


@group.command("clock-latency")
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


@group.command("actuate")
def actuate_command(
    *,
    gpus: GpuSets,
    backend: Backend = "nvml",
    sockets: Sockets = SOCKETS,
    observe_only: Annotated[bool, typer.Option(help="Log what would be set, set nothing.")] = False,
    lease: Annotated[
        float, typer.Option(help="Seconds without a living controller until clocks are reset.")
    ] = 1.5,
    hot: Annotated[
        float, typer.Option(help="Degrees Celsius above which clocks are not raised.")
    ] = 85.0,
    lower_bound: Annotated[
        str, typer.Option(help="fixed locks (f, f), cap locks (lowest, f).")
    ] = "fixed",
    gpu_spec: GpuSpec = None,
    instance: Annotated[
        Path | None,
        typer.Option(help="YAML description of the instance, for the range of its GPU."),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="JSON lines of every clock change with all time stamps.")
    ] = None,
    settings: SettingsFile = None,
) -> None:
    """Own the clocks of these GPUs until a signal; needs root with NVML.

    Every clock is reset on any way out.
    """
    from biscale_env.hardware.clocks.backend_registry import open_backend
    from biscale_env.hardware.loop.actuator import Actuator, serve
    from biscale_env.hardware.loop.gpu_group import ActuatorConfig

    low, high = clock_bounds(gpu_spec, instance)
    config = ActuatorConfig(
        groups=parse_groups(gpus),
        sockets=sockets,
        backend=backend,
        freq_min_mhz=low,
        freq_max_mhz=high,
        lease_s=lease,
        hot_c=hot,
        lower_bound=lower_bound,
    )
    with open_backend(backend, observe_only) as device, log_to(log) as stream:
        serve(Actuator(config, device, stream, realtime=True))


@group.command("restore")
def restore_command(
    backend: Backend = "nvml",
    all_gpus: Annotated[
        bool, typer.Option("--all", help="Reset every GPU of the backend, recorded or not.")
    ] = False,
) -> None:
    """Reset every clock that an earlier run of ours may have left locked.

    Every GPU is tried and reported; exit code 2 when one could not be reset.
    """
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.clocks import owner
    from biscale_env.hardware.clocks.backend_registry import open_backend

    restore: Callable[..., list[owner.Recovery]] = owner.restore_all if all_gpus else owner.recover
    with open_backend(backend) as device:
        outcomes = restore(device, backend)
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


@group.command("emulate")
def emulate_command(
    *,
    state: Annotated[Path, typer.Option(help="File of the fake GPUs; made anew.")] = SOCKETS
    / "gpus",
    sockets: Sockets = SOCKETS,
    host: str = "127.0.0.1",
    prefill_port: int = 8100,
    decode_port: int = 8200,
    instance: Instance = None,
    gpu: GpuName = None,
    llm: LlmName = None,
    model: Model = None,
    tp: Tp = None,
    ep: EpDegree = None,
    dtype: Dtype = None,
    token_budget: TokenBudget = None,
    max_seqs: MaxSeqs = None,
    max_model_len: int = 16_384,
    delay: Annotated[
        float, typer.Option(help="Seconds from a clock request to its effect.")
    ] = 0.05,
    member: Annotated[
        int, typer.Option(help="Ensemble member of the emulated plant; -1 nominal.")
    ] = -1,
    phase: Annotated[
        str, typer.Option(help="both, or one engine on an existing --state.")
    ] = "both",
    settings: SettingsFile = None,
) -> None:
    """Serve an emulated prefill and decode engine in real time, on fake GPUs. Needs no GPU.

    The engines obey the clocks of the fake GPUs.
    """
    from biscale_env.hardware.emulation.emulate import EmulatorSettings

    limits = {"tp": tp, "ep": ep, "dtype": dtype}
    limits |= {"token_budget": token_budget, "max_seqs": max_seqs}
    emulated = EmulatorSettings(
        state=state.absolute(),
        sockets=sockets.absolute(),
        host=host,
        ports=(prefill_port, decode_port),
        instance=instance_of(instance, gpu=gpu, llm=llm, model=model, **limits),
        max_model_len=max_model_len,
        delay_s=delay,
        member=member,
    )
    _emulate(emulated, phase)


def _emulate(settings: "EmulatorSettings", phase: str) -> None:
    """Serve one engine, or make the fake GPUs and serve both."""
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.emulation.emulate import PHASES, Emulation, run_instance

    if phase in PHASES:
        run_instance(settings, phase)
        return
    if phase != "both":
        raise BiscaleError(f"unknown phase '{phase}': choose both, prefill or decode")
    with Emulation(settings) as emulation:
        prefill, decode = emulation.urls
        typer.echo(
            f"emulated engines at {prefill} (prefill) and {decode} (decode), "
            f"{2 * settings.instance.tp} fake GPUs in {settings.state}"
        )
        typer.echo(
            f"in another terminal: biscale replay --backend fake:{settings.state} "
            f"--sockets {settings.sockets} --engine emulated --policy biscale "
            f"--prefill {prefill} --decode {decode} --trace azure-conv-like --rate 3 "
            "--duration 60 --out runs/emulated"
        )
        emulation.wait()


@group.command("control")
def control_command(
    *,
    phase: Phase,
    policy: Annotated[
        str, typer.Option(help="mpc, slack, static:1200, a checkpoint, or a recording (*.parquet).")
    ],
    sockets: Sockets = SOCKETS,
    instance: Instance = None,
    tp: Tp = None,
    ep: EpDegree = None,
    dtype: Dtype = None,
    model: Model = None,
    slo: Annotated[str | None, typer.Option(help="SLO; default biscale.")] = None,
    token_budget: TokenBudget = None,
    max_seqs: MaxSeqs = None,
    delay: Annotated[
        float | None, typer.Option(help="Expected actuation delay, s; default that of the model.")
    ] = None,
    lease: float = 1.5,
    backend: Annotated[
        str | None, typer.Option(help="Backend to read power from; default none.")
    ] = None,
    gpus: Annotated[str, typer.Option(help="GPUs to read power from, e.g. 0,1,2,3.")] = "",
    log: Annotated[Path | None, typer.Option(help="JSON lines of every decision.")] = None,
    settings: SettingsFile = None,
) -> None:
    """Decide the clock of one engine instance from its records, until a signal."""
    from biscale_env.envs.plant import Plant, PlantSettings
    from biscale_env.hardware.loop.control import ControlConfig, ControlLoop, serve
    from biscale_env.hardware.loop.recorded_policy import load_policy

    spec = instance_of(
        instance,
        tp=tp,
        ep=ep,
        dtype=dtype,
        model=model,
        slo=slo,
        token_budget=token_budget,
        max_seqs=max_seqs,
    )
    plant = Plant(PlantSettings.of(phase, instance=spec, actuation_delay_s=delay))
    chosen = load_policy(policy, plant)
    config = ControlConfig(sockets, delay_s=plant.delay_s(-1), lease_s=lease, realtime=True)
    with contextlib.ExitStack() as stack:
        meter = _meter(stack, backend, gpus)
        stream = stack.enter_context(log_to(log))
        serve(ControlLoop(plant, chosen, config, stream, meter))


def _meter(stack: contextlib.ExitStack, backend: str | None, gpus: str) -> "PowerMeter | None":
    """What reads the power of these GPUs; None where nothing is to be read."""
    from biscale_env.hardware.clocks.backend_registry import open_backend
    from biscale_env.hardware.loop.control import PowerMeter

    if not backend:
        return None
    reader = stack.enter_context(open_backend(backend, observe_only=True))
    keys = parse_groups([f"x={gpus}"])["x"] if gpus else ()
    return PowerMeter(reader, [reader.device(key).uuid for key in keys])


@group.command("bridge")
def bridge_command(
    phase: Phase,
    source: Annotated[
        str,
        typer.Option(
            help="Stream of ForwardPassMetrics (tcp://, ipc://) or address with /metrics (http://)."
        ),
    ],
    sockets: Sockets = SOCKETS,
    every: Annotated[float, typer.Option(help="Seconds between polls of an http source.")] = 0.1,
) -> None:
    """Forward the records of an engine without our hook to the controller, until a signal."""
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.emulation.emulate import PHASES, all_records_endpoint
    from biscale_env.hardware.engines.hook.sender import Sender
    from biscale_env.hardware.engines.sources import (
        PrometheusPoller,
        forward,
        metrics_stream,
        polled,
    )
    from biscale_env.hardware.loop import wire
    from biscale_env.hardware.loop.processes import until_signal

    if phase not in PHASES:
        raise BiscaleError(f"unknown phase '{phase}': choose prefill or decode")
    wire.socket_folder(sockets)
    ended = until_signal()
    sender = Sender(
        wire.record_endpoint(sockets, phase), all_records_endpoint(sockets, phase), heartbeat_s=None
    )
    records = (
        polled(PrometheusPoller(source), every, ended.is_set)
        if source.startswith("http")
        else metrics_stream(source, ended.is_set)
    )
    typer.echo(f"{phase} bridge ready")
    count = forward(records, sender)
    sender.close()
    typer.echo(f"{count} records forwarded")
