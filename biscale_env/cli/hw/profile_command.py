"""``biscale profile``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biscale_env.cli.hw.hw_options import need_hardware

if TYPE_CHECKING:
    from biscale_env.config import InstanceSpec


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("profile")(profile_command)


def profile_command(
    *,
    out: Annotated[Path, typer.Option(help="CSV to write; its provenance goes beside it.")] = Path(
        "profile.csv"
    ),
    tp: Annotated[
        list[int] | None,
        typer.Option(help="TP degree whose shard is run; repeatable; default 4 and 8."),
    ] = None,
    phase: Annotated[str, typer.Option(help="both, prefill or decode.")] = "both",
    clocks: Annotated[
        str, typer.Option(help="default never touches the clock; or MHz, e.g. 810,1200,1605,1980.")
    ] = "default",
    backend: Annotated[
        str, typer.Option(help="nvml, zeusd[:SOCKET], fake:FILE, or none for latency only.")
    ] = "nvml",
    gpu: Annotated[str, typer.Option(help="Index or UUID of the GPU.")] = "0",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the command.")] = "cuda",
    layers: Annotated[
        int | None, typer.Option(help="Run fewer layers and scale up; default all.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A coarse grid.")] = False,
    tiny: Annotated[
        bool,
        typer.Option(
            help="A rehearsal with a miniature model, on a CPU too; measures nothing of use."
        ),
    ] = False,
    measure_s: Annotated[float, typer.Option(help="Seconds per point.")] = 3.0,
    model: Annotated[
        str, typer.Option(help="Fitted model to compare with.")
    ] = "h100-sxm/llama-3.3-70b",
    gpu_spec: Annotated[
        str | None,
        typer.Option(
            "--gpu-spec", help="Description of this GPU (name or YAML file), to compare with."
        ),
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(
            "--llm", help="LLM whose shapes are run, name or YAML file; default Llama 70B."
        ),
    ] = None,
) -> None:
    """Measure latency and power of iterations on one GPU, for `biscale fit --profile`."""
    need_hardware()
    from biscale_env.config import InstanceSpec
    from biscale_env.core.errors import BiscaleError
    from biscale_env.core.extras import need_packages
    from biscale_env.hardware.clocks.backend_registry import open_backend
    from biscale_env.hardware.profile import profiler

    if phase not in ("both", "prefill", "decode"):
        raise BiscaleError(f"unknown phase '{phase}': choose both, prefill or decode")
    need_packages("the profiler needs", "hw,rl", {"torch": "torch"})
    wanted = parse_clocks(clocks)
    if device != "cuda" and not tiny:
        raise BiscaleError(
            f"the shapes of a large model on {device} would take hours and tell nothing: "
            "add --tiny to rehearse the command"
        )
    settings = profiler.ProfileSettings(
        llm=llm or profiler.ProfileSettings.llm,
        device=device,
        layers=layers,
        warm_s=0.05 if tiny else 1.0,
        measure_s=0.1 if tiny else measure_s,
        clocks_mhz=wanted,
        miniature=tiny,
    )
    _need_device(device)
    reader = None if backend == "none" else open_backend(backend, observe_only=not wanted)
    points = profiler.grid_points(tp or [4, 8], phase, quick, tiny)
    rows = []
    try:
        machine = profiler.Profiler(settings, reader, gpu)
        for row in machine.measure(points):
            rows.append(row)
            profiler.write_table(out, rows, profiler.provenance(machine))
            instance = None if tiny else InstanceSpec(model=model, gpu=gpu_spec, llm=llm)
            typer.echo(_told(row, instance))
    finally:
        if reader:
            reader.close()
    typer.echo(
        f"{len(rows)} points in {out}; fit them: biscale fit --profile {out} --out models/mine"
    )


def _told(row: "dict[str, Any]", instance: "InstanceSpec | None") -> str:
    """One measured point in words, beside what the model says; None compares with nothing."""
    import pandas as pd

    from biscale_env.hardware.profile.profiler import predictions

    latency = power = ""
    if instance is not None:
        said = predictions(pd.DataFrame([row]), instance).iloc[0]
        latency, power = (
            f" (model {said['latency_s'] * 1e3:8.2f})",
            f" (model {said['power_w']:6.1f})",
        )
    return (
        f"{row['phase']:7} tp{row['tp']} batch {row['batch']:3} new {row['new_tokens']:5} "
        f"context {row['context']:6}: {row['latency_s'] * 1e3:8.2f} ms{latency}, "
        f"{row['power_w']:6.1f} W{power}, {row['freq_mhz']:6.0f} MHz"
    )


def _need_device(device: str) -> None:
    """Said before the driver is looked for: without a GPU it is the first thing to know."""
    import torch

    from biscale_env.core.errors import BiscaleError

    if device == "cuda" and not torch.cuda.is_available():
        raise BiscaleError(
            "there is no CUDA device here: profile on a machine with an NVIDIA GPU, "
            "or rehearse with --device cpu --tiny --backend none"
        )


def parse_clocks(text: str) -> tuple[float, ...]:
    """Clocks of ``--clocks``; empty for ``default``.

    Raises:
        BiscaleError: neither ``default`` nor numbers.
    """
    from biscale_env.core.errors import BiscaleError

    if text == "default":
        return ()
    try:
        clocks = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BiscaleError(
            f"--clocks '{text}': write default, or clocks in MHz such as 810,1200,1980"
        ) from None
    if not all(100 <= c <= 4000 for c in clocks):
        raise BiscaleError(f"--clocks '{text}': these are not clocks of a GPU in MHz")
    return clocks
