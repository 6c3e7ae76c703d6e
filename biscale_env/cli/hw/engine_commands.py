"""``biscale hw emulate | control | bridge``: engines, and who decides their clocks."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biscale_env.cli.hw.hw_options import (
    SOCKETS,
    ApiKey,
    Delay,
    Dtype,
    Instance,
    Keys,
    Lease,
    LookAhead,
    MaxSeqs,
    Means,
    Model,
    Phase,
    Slo,
    Sockets,
    TokenBudget,
    Tp,
    instance_of,
    log_to,
    parse_groups,
)
from biscale_env.cli.hw.settings_file import SettingsFile
from biscale_env.cli.instance_options import EpDegree, GpuName, LlmName

if TYPE_CHECKING:
    from biscale_env.hardware.emulation.emulate import EmulatorSettings
    from biscale_env.hardware.loop.control import PowerMeter


def register(group: typer.Typer) -> None:
    """Add the commands to ``hw``."""
    group.command("emulate")(emulate_command)
    group.command("control")(control_command)
    group.command("bridge")(bridge_command)


def emulate_command(
    deployment: Annotated[
        str | None,
        typer.Argument(help="Deployment to emulate; without, one pair by the options."),
    ] = None,
    *,
    only: Annotated[
        str | None, typer.Option(help="Of a deployment: one instance, or 'router'.")
    ] = None,
    state: Annotated[Path, typer.Option(help="File of the fake GPUs; made anew.")] = SOCKETS
    / "gpus",
    sockets: Sockets = SOCKETS,
    host: Annotated[str, typer.Option(help="Address that the engines listen at.")] = "127.0.0.1",
    prefill_port: Annotated[int, typer.Option(help="Port of the prefill engine.")] = 8100,
    decode_port: Annotated[int, typer.Option(help="Port of the decode engine.")] = 8200,
    instance: Instance = None,
    gpu: GpuName = None,
    llm: LlmName = None,
    model: Model = None,
    tp: Tp = None,
    ep: EpDegree = None,
    dtype: Dtype = None,
    token_budget: TokenBudget = None,
    max_seqs: MaxSeqs = None,
    max_model_len: Annotated[
        int, typer.Option(help="Longest request, prompt and answer together, tokens.")
    ] = 16_384,
    delay: Annotated[
        float, typer.Option(help="Seconds from a clock request to its effect.")
    ] = 0.05,
    member: Annotated[
        int, typer.Option(help="Ensemble member of the emulated plant; -1 nominal.")
    ] = -1,
    phase: Annotated[
        str, typer.Option(help="both, or one engine on an existing --state.")
    ] = "both",
    async_scheduling: Annotated[
        bool, typer.Option(help="Form a batch while the one before it runs, as vLLM does.")
    ] = False,
    settings: SettingsFile = None,
) -> None:
    """Serve an emulated prefill and decode engine in real time, on fake GPUs. Needs no GPU.

    The engines obey the clocks of the fake GPUs. With a deployment, all of its instances and the
    router in front of them.
    """
    if deployment is not None:
        _emulate_deployment(deployment, only, member)
        return
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
        asynchronous=async_scheduling,
    )
    _emulate(emulated, phase)


def _emulate_deployment(named: str, only: str | None, member: int) -> None:
    """Serve one part of an emulated deployment, or all of it."""
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.deploy import emulated_deployment as emulated
    from biscale_env.hardware.deploy.deployment_file import load_deployment

    deployment = load_deployment(named)
    if only == emulated.ROUTER:
        emulated.run_router(deployment)
    elif only in deployment.instances:
        emulated.run_engine(deployment, only, member)
    elif only is not None:
        known = ", ".join([*deployment.instances, emulated.ROUTER])
        raise BiscaleError(f"{deployment.name} has no '{only}'; known: {known}")
    else:
        with emulated.EmulatedDeployment(deployment, named, member) as emulation:
            typer.echo(
                f"{deployment.name} is emulated: {len(deployment.instances)} engines, requests go "
                f"to {deployment.router.url}"
            )
            typer.echo(f"in another terminal: biscale hw up {named}")
            emulation.wait()


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
    slo: Slo = None,
    token_budget: TokenBudget = None,
    max_seqs: MaxSeqs = None,
    delay: Delay = None,
    lease: Lease = 1.5,
    look_ahead: LookAhead = True,
    means: Means = "lock",
    backend: Annotated[
        str | None, typer.Option(help="Backend to read power from; default none.")
    ] = None,
    gpus: Annotated[str, typer.Option(help="GPUs to read power from, e.g. 0,1,2,3.")] = "",
    log: Annotated[Path | None, typer.Option(help="JSON lines of every decision.")] = None,
    group: Annotated[
        str | None, typer.Option(help="The actuator's name of these GPUs; default the phase.")
    ] = None,
    records: Annotated[
        str | None, typer.Option(help="Address at which records are taken; default by --sockets.")
    ] = None,
    commands: Annotated[
        str | None, typer.Option(help="The actuator's address of commands; default by --sockets.")
    ] = None,
    status: Annotated[
        str | None, typer.Option(help="The actuator's address of clocks; default by --sockets.")
    ] = None,
    actuator: Annotated[
        str | None, typer.Option(help="Machine of the actuator, by whose key it is known.")
    ] = None,
    keys: Keys = None,
    decisions: Annotated[
        str | None, typer.Option(help="Publish every decision at this address.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Take base clocks of tier 1 at this address.")
    ] = None,
    settings: SettingsFile = None,
) -> None:
    """Decide the clock of one engine instance from its records, until a signal."""
    from biscale_env.envs.plant import Plant, PlantSettings
    from biscale_env.hardware.loop.control import ControlConfig, ControlLoop, serve
    from biscale_env.hardware.loop.recorded_policy import load_policy
    from biscale_env.hardware.remote.controller_links import ControllerAddresses

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
    default = ControllerAddresses.in_folder(sockets, phase, group or phase)
    config = ControlConfig(
        sockets,
        delay_s=plant.delay_s(-1),
        lease_s=lease,
        group=group,
        realtime=True,
        addresses=ControllerAddresses(
            records or default.records,
            commands or default.commands,
            status or default.status,
            actuator,
            keys,
        ),
        decisions=decisions,
        look_ahead=look_ahead,
        base=base,
        means=means,
    )
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


def bridge_command(
    phase: Phase,
    source: Annotated[
        str,
        typer.Option(
            help="Stream of ForwardPassMetrics (tcp://, ipc://), address with /metrics (http://), "
            "or NAME:ADDRESS of an engine that an installed package knows."
        ),
    ],
    sockets: Sockets = SOCKETS,
    every: Annotated[float, typer.Option(help="Seconds between polls of an http source.")] = 0.1,
    give_up: Annotated[
        float, typer.Option(help="Seconds of failing polls after which the bridge ends.")
    ] = 30.0,
    api_key: ApiKey = None,
) -> None:
    """Forward the records of an engine without our hook to the controller, until a signal."""
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.emulation.emulate import PHASES, all_records_endpoint
    from biscale_env.hardware.engines.hook.sender import Sender
    from biscale_env.hardware.engines.installed_engines import installed_records
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
    records = installed_records(source, ended.is_set)
    if records is None:
        records = (
            polled(
                PrometheusPoller(source, api_key=api_key), every, ended.is_set, give_up, typer.echo
            )
            if source.startswith("http")
            else metrics_stream(source, ended.is_set)
        )
    typer.echo(f"{phase} bridge ready")
    count = forward(records, sender)
    sender.close()
    typer.echo(f"{count} records forwarded")
