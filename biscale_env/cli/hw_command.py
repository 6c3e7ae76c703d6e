"""``biscale hw``: what works here, how fast clocks change, the actuator, the emulated engine,
restoring clocks.
"""

from pathlib import Path
from typing import Annotated

import typer

from biscale_env.cli import profile_command, replay_command
from biscale_env.cli.hw_options import SOCKETS, need_extra, open_log, parse_groups
from biscale_env.core.files import write_whole

group = typer.Typer(
    no_args_is_help=True, help="Real GPUs and engines: check, measure, actuate, emulate, restore."
)

Backend = Annotated[str, typer.Option(help="nvml, zeusd[:SOCKET] or fake:STATE_FILE.")]
Sockets = Annotated[
    Path, typer.Option(help="Folder of the sockets between hook, controller and actuator.")
]
GpuSets = Annotated[
    list[str],
    typer.Option("--gpus", help="GPUs of one instance, e.g. prefill=0,1,2,3; repeatable."),
]


def register(app: typer.Typer) -> None:
    """Add the ``hw`` group and the commands that use it."""
    app.add_typer(group, name="hw")
    replay_command.register(app)
    profile_command.register(app)


@group.callback()
def prepare(context: typer.Context) -> None:
    """Real GPUs and engines: check, measure, actuate, emulate, restore."""
    if context.invoked_subcommand != "doctor":  # which says itself what is missing
        need_extra()


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
) -> None:
    """Measure how long a clock change takes here; locks and resets the clock of one GPU."""
    from biscale_env.config import load_gpu
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.clocks import change_latency
    from biscale_env.hardware.clocks.backend import open_backend

    if clocks < 2 or repeats < 1:
        raise BiscaleError("--clocks must be at least 2 and --repeats at least 1")
    if (table := open_log(out)) is not None:  # said before anything is measured
        table.close()
    if into:
        change_latency.family_files(into)
    limits = load_gpu()
    with open_backend(backend) as device:
        uuid = device.device(gpu).uuid
        usable = [
            f for f in device.supported_mhz(uuid) if limits.freq_min_mhz <= f <= limits.freq_max_mhz
        ]
        pairs = change_latency.pairs_of(usable, clocks)
        found = change_latency.measure(device, backend, uuid, pairs, repeats, tell=_tell_switch)
    summary = change_latency.summarise(found)
    typer.echo(
        f"{len(found)} changes: driver call median {summary['call_median_s'] * 1e3:.2f} ms, P99 {summary['call_p99_s'] * 1e3:.2f} ms; "
        f"clock seen after median {summary['seen_median_s'] * 1e3:.1f} ms, P99 {summary['seen_p99_s'] * 1e3:.1f} ms "
        f"({summary['seen_share']:.0%} seen)"
    )
    if out:
        write_whole(out, change_latency.as_frame(found).to_csv(index=False))
    if into:
        for path in change_latency.write_delays(into, found):
            typer.echo(f"delays written into {path}")
    else:
        typer.echo(
            f"use it: --delay {summary['seen_median_s']:.3f}, or write it into your fitted models with --into FOLDER"
        )


def _tell_switch(switch: object) -> None:
    from biscale_env.hardware.clocks.change_latency import Switch

    assert isinstance(switch, Switch)
    typer.echo(
        f"{switch.from_mhz:6g} -> {switch.to_mhz:6g} MHz: call {switch.call_s * 1e3:6.2f} ms, seen {switch.seen_s * 1e3:6.1f} ms"
    )


@group.command("actuate")
def actuate_command(
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
    log: Annotated[
        Path | None, typer.Option(help="JSON lines of every clock change with all time stamps.")
    ] = None,
) -> None:
    """Own the clocks of these GPUs until a signal; needs root with NVML.

    Every clock is reset on any way out.
    """
    from biscale_env.config import load_gpu
    from biscale_env.hardware.clocks.backend import open_backend
    from biscale_env.hardware.loop.actuator import Actuator, ActuatorConfig, serve

    limits = load_gpu()
    config = ActuatorConfig(
        groups=parse_groups(gpus), sockets=sockets, backend=backend, freq_min_mhz=limits.freq_min_mhz,
        freq_max_mhz=limits.freq_max_mhz, lease_s=lease, hot_c=hot, lower_bound=lower_bound,
    )  # fmt: skip
    with open_backend(backend, observe_only) as device:
        stream = open_log(log)
        try:
            serve(Actuator(config, device, stream, first=True))
        finally:
            if stream:
                stream.close()


@group.command("restore")
def restore_command(
    backend: Backend = "nvml",
    all_gpus: Annotated[
        bool, typer.Option("--all", help="Reset every GPU of the backend, noted or not.")
    ] = False,
) -> None:
    """Reset every clock that an earlier run of ours may have left locked."""
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.clocks import owner
    from biscale_env.hardware.clocks.backend import open_backend

    with open_backend(backend) as device:
        outcomes = owner.recover(device, backend)
        if all_gpus:
            for gpu in device.devices():
                claim = owner.Claim(gpu.uuid)
                device.reset(gpu.uuid)
                claim.release()
                outcomes.append((gpu.uuid, "reset"))
    for uuid, outcome in outcomes:
        typer.echo(f"{uuid}: {outcome}")
    if not outcomes:
        typer.echo("nothing to restore: no clock was left locked by us")
    failed = [uuid for uuid, outcome in outcomes if outcome.startswith("NOT")]
    if failed:
        raise BiscaleError(
            f"{len(failed)} clocks could not be reset, the first is {failed[0]}: see above"
        )


@group.command("emulate")
def emulate_command(
    state: Annotated[Path, typer.Option(help="File of the fake GPUs; made anew.")] = SOCKETS
    / "gpus",
    sockets: Sockets = SOCKETS,
    host: str = "127.0.0.1",
    prefill_port: int = 8100,
    decode_port: int = 8200,
    tp: Annotated[int, typer.Option(help="GPUs per instance.")] = 4,
    dtype: str = "bf16",
    model: Annotated[str, typer.Option(help="Fitted model to emulate.")] = "h100-llama70b",
    token_budget: Annotated[int, typer.Option(help="New tokens per prefill batch.")] = 2048,
    max_seqs: Annotated[int, typer.Option(help="Requests per batch.")] = 256,
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
) -> None:
    """Serve an emulated prefill and decode engine in real time, on fake GPUs whose clocks they
    obey. Needs no GPU.
    """
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.emulation.emulate import (
        PHASES,
        Emulation,
        EmulatorSettings,
        run_instance,
    )

    settings = EmulatorSettings(
        state=state.absolute(), sockets=sockets.absolute(), host=host, ports=(prefill_port, decode_port), tp=tp, dtype=dtype, model=model,
        token_budget=token_budget, max_seqs=max_seqs, max_model_len=max_model_len, delay_s=delay, member=member,
    )  # fmt: skip
    if phase in PHASES:
        return run_instance(settings, phase)
    if phase != "both":
        raise BiscaleError(f"unknown phase '{phase}': choose both, prefill or decode")
    with Emulation(settings) as emulation:
        prefill, decode = emulation.urls
        typer.echo(
            f"emulated engines at {prefill} (prefill) and {decode} (decode), {2 * tp} fake GPUs in {state}"
        )
        typer.echo(
            f"in another terminal: biscale replay --backend fake:{state} --sockets {sockets} --engine emulated --policy biscale "
            f"--prefill {prefill} --decode {decode} --trace azure-conv-like --rate 3 --duration 60 --out runs/emulated"
        )
        emulation.wait()


@group.command("control")
def control_command(
    phase: Annotated[str, typer.Option(help="prefill or decode.")],
    policy: Annotated[
        str, typer.Option(help="mpc, slack, static:1200, a checkpoint, or a recording (*.parquet).")
    ],
    sockets: Sockets = SOCKETS,
    tp: int = 4,
    dtype: str = "bf16",
    model: str = "h100-llama70b",
    slo: str = "biscale",
    token_budget: int = 2048,
    max_seqs: int = 256,
    delay: Annotated[
        float | None, typer.Option(help="Expected actuation delay, s; default that of the model.")
    ] = None,
    lease: float = 1.5,
    backend: Annotated[
        str | None, typer.Option(help="Backend to read power from; default none.")
    ] = None,
    gpus: Annotated[str, typer.Option(help="GPUs to read power from, e.g. 0,1,2,3.")] = "",
    log: Annotated[Path | None, typer.Option(help="JSON lines of every decision.")] = None,
) -> None:
    """Decide the clock of one engine instance from its records, until a signal."""
    from biscale_env.envs.plant import Plant, PlantSettings
    from biscale_env.hardware.clocks.backend import open_backend
    from biscale_env.hardware.loop.control import ControlLoop, PowerMeter, serve
    from biscale_env.hardware.loop.recorded_policy import load_policy

    settings = PlantSettings.of(
        phase,
        model=model,
        tp=tp,
        dtype=dtype,
        slo=slo,
        token_budget=token_budget,
        max_seqs=max_seqs,
        actuation_delay_s=delay,
    )
    plant = Plant(settings)
    chosen = load_policy(policy, plant)
    reader = open_backend(backend, observe_only=True) if backend else None
    keys = parse_groups([f"x={gpus}"])["x"] if gpus else ()
    meter = PowerMeter(reader, [reader.device(k).uuid for k in keys]) if reader else None
    stream = open_log(log)
    try:
        serve(
            ControlLoop(
                plant,
                chosen,
                sockets,
                delay_s=plant.delay_s(-1),
                lease_s=lease,
                log=stream,
                meter=meter,
                first=True,
            )
        )
    finally:
        if stream:
            stream.close()
        if reader:
            reader.close()


@group.command("bridge")
def bridge_command(
    phase: Annotated[str, typer.Option(help="prefill or decode.")],
    source: Annotated[
        str,
        typer.Option(
            help="Stream of ForwardPassMetrics (tcp://, ipc://) or address with /metrics (http://)."
        ),
    ],
    sockets: Sockets = SOCKETS,
    every: Annotated[float, typer.Option(help="Seconds between polls of an http source.")] = 0.1,
) -> None:
    """Hand the records of an engine without our hook to the controller, until a signal."""
    import signal

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

    if phase not in PHASES:
        raise BiscaleError(f"unknown phase '{phase}': choose prefill or decode")
    sockets.mkdir(parents=True, exist_ok=True)
    ended = False

    def end(number: int, frame: object) -> None:
        nonlocal ended
        ended = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    sender = Sender(
        wire.record_endpoint(sockets, phase), all_records_endpoint(sockets, phase), heartbeat_s=None
    )
    records = (
        polled(PrometheusPoller(source), every, lambda: ended)
        if source.startswith("http")
        else metrics_stream(source, lambda: ended)
    )
    typer.echo(f"{phase} bridge ready")
    count = forward(records, sender)
    sender.close()
    typer.echo(f"{count} records handed on")


@group.command("bench")
def bench_command(
    seconds: Annotated[
        float, typer.Option(help="Length of each of the two closed-loop runs; 0 leaves them out.")
    ] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Measure the hook's cost, the loop's latency and the replayer's punctuality on emulated
    engines.
    """
    from rich.console import Console
    from rich.table import Table

    from biscale_env.benchmarks import hardware_loop

    figures = hardware_loop.hook_figures()
    if seconds > 0:
        figures += hardware_loop.loop_figures(seconds)
        agents = hardware_loop.loop_figures(
            seconds, policies={"prefill": "agent", "decode": "agent"}
        )
        figures += [figure for figure in agents if figure.name.startswith("record")]
    if as_json:
        typer.echo(hardware_loop.as_json(figures))
        return
    table = Table("figure", "value", "target", "met")
    for f in figures:
        table.add_row(
            f.name,
            f"{f.value:.3g} {f.unit}",
            f"{'>=' if f.at_least else '<='} {f.target:g} {f.unit}",
            "yes" if f.met else "no",
        )
    Console().print(table)
