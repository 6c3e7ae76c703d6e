"""``biscale hw observe | explore``: record a running engine; ``biscale fit --from`` fits it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biscale_env.cli.hw.hw_options import (
    SOCKETS,
    Backend,
    Delay,
    Lease,
    Sockets,
    describes_engine,
    need_extra,
    parse_groups,
)

if TYPE_CHECKING:
    from biscale_env.config import InstanceSpec
    from biscale_env.models.fit.run_fit import RunFit

DESCRIBED = ("gpu", "llm", "model", "tp", "dtype", "token_budget", "max_seqs")
Seconds = Annotated[float, typer.Option(help="How long, s; Ctrl-C ends it early.")]
ObservedGpus = Annotated[
    list[str],
    typer.Option("--gpus", help="GPUs of each engine, e.g. prefill=0-3; repeatable."),
]
EngineKind = Annotated[
    str, typer.Option(help="vllm, sglang, dynamo or emulated: what a hint names.")
]


def register(group: typer.Typer) -> None:
    """Add the commands to ``hw``."""
    group.command("observe")(observe_command)
    group.command("explore")(explore_command)


@describes_engine(*DESCRIBED)
def observe_command(
    *,
    gpus: ObservedGpus,
    duration: Seconds = 600.0,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/observed"),
    backend: Backend = "nvml",
    sockets: Sockets = SOCKETS,
    engine: EngineKind = "vllm",
    instance: "InstanceSpec",
) -> None:
    """Record a running engine under its own traffic. No clock is touched.

    Needs no privilege.
    """
    options = {"backend": backend, "sockets": sockets.absolute(), "engine": engine}
    _record(gpus, duration, out, explore=False, instance=instance, **options)


@describes_engine(*DESCRIBED)
def explore_command(
    *,
    gpus: ObservedGpus,
    duration: Seconds = 600.0,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/explored"),
    backend: Backend = "nvml",
    sockets: Sockets = SOCKETS,
    engine: EngineKind = "vllm",
    slo: Annotated[str | None, typer.Option(help="SLO that bounds the visits.")] = None,
    lease: Lease = 1.5,
    delay: Delay = None,
    instance: "InstanceSpec",
) -> None:
    """As observe, and visit clocks above the one that BiScale's own policies ask for.

    Clocks are set by an actuator of its own, under the same promises as in a replay: root with
    NVML.
    """
    spec = instance if slo is None else instance.changed(slo=slo)
    options = {"backend": backend, "sockets": sockets.absolute(), "engine": engine}
    more = {"lease_s": lease, "delay_s": delay}
    _record(gpus, duration, out, explore=True, instance=spec, **options, **more)


def _record(gpus: list[str], duration: float, out: Path, explore: bool, **options: object) -> None:
    from rich.console import Console

    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.loop.processes import until_signal
    from biscale_env.hardware.observe.run_observer import observe, settings_of
    from biscale_env.hardware.replay.closed_loop import PHASES

    groups = parse_groups(gpus)
    if wrong := set(groups) - set(PHASES):
        raise BiscaleError(f"--gpus {min(wrong)}=...: name the phase, prefill or decode")
    settings = settings_of(tuple(groups), explore, gpus=groups, **options)
    console, ended = Console(), until_signal()
    with console.status("") as line:

        def tell(elapsed_s: float) -> None:
            line.update(f"recording: {elapsed_s:.0f} of {duration:g} s")

        run = observe(settings, out, duration, ended, tell)
    for phase, count in run.iterations.items():
        console.print(f"{phase}: {count:,} iterations recorded", highlight=False)
    for problem in run.problems:
        console.print(f"[yellow]{problem}[/]")
    console.print(f"now: biscale fit --from {out} --out models/mine", highlight=False)


def fit_from_run(run: Path, out: Path, base: str | None) -> None:
    """Correct the models of every phase that a run recorded, and write them.

    Raises:
        BiscaleError: no run, or not one phase can be fitted.
    """
    need_extra()  # records are read with the packages that wrote them
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.observe.run_iterations import observed_iterations
    from biscale_env.hardware.replay.raw_log import read_raw
    from biscale_env.models.coefficient_files import stem
    from biscale_env.models.fit.llm_files import write_family
    from biscale_env.models.fit.run_fit import fit_run

    if out.suffix in {".yaml", ".yml"}:
        raise BiscaleError(f"--from writes a file per phase: give --out a folder, not {out}")
    raw = read_raw(run / "raw" if (run / "raw").is_dir() else run)
    s, written = raw.instance, 0
    for phase in raw.phases:
        try:
            seen = observed_iterations(raw, phase)
            family = base or s.family
            fitted = fit_run(seen, family, s.tp, s.dtype, s.ep, s.gpu, s.llm, out.name)
        except BiscaleError as error:
            if phase == raw.phases[-1] and not written:
                raise
            typer.echo(f"{phase}: not fitted: {error}")
            continue
        content = fitted.fit.content
        path = out / f"{stem(content.phase, content.dtype, content.tp, content.ep)}.yaml"
        write_family(fitted.fit.files(path), path.parent)
        written += 1
        _tell_fit(path, fitted)


def _tell_fit(path: Path, fitted: "RunFit") -> None:
    train, held_out = fitted.iterations
    typer.echo(
        f"{path}: error of iteration times on held-out minutes {fitted.before_mape:.1%} before, "
        f"{fitted.fit.latency_mape:.1%} after ({train:,} iterations fitted, {held_out:,} held out)"
    )
    typer.echo(f"  borrowed from the model that it began with: {'; '.join(fitted.borrowed)}")
