"""``biscale profile``."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from biscale_env.cli.hw_options import need_extra


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("profile")(profile_command)


def profile_command(
    out: Annotated[Path, typer.Option(help="CSV to write; its provenance goes beside it.")] = Path("profile.csv"),
    tp: Annotated[
        list[int] | None, typer.Option(help="TP degree whose shard is run; repeatable; default 4 and 8.")
    ] = None,
    phase: Annotated[str, typer.Option(help="both, prefill or decode.")] = "both",
    clocks: Annotated[
        str, typer.Option(help="default never touches the clock; or MHz, e.g. 810,1200,1605,1980.")
    ] = "default",
    backend: Annotated[str, typer.Option(help="nvml, zeusd[:SOCKET], fake:FILE, or none for latency only.")] = "nvml",
    gpu: Annotated[str, typer.Option(help="Index or UUID of the GPU.")] = "0",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the command.")] = "cuda",
    layers: Annotated[int | None, typer.Option(help="Run fewer layers and scale up; default all.")] = None,
    quick: Annotated[bool, typer.Option(help="A coarse grid.")] = False,
    measure_s: Annotated[float, typer.Option(help="Seconds per point.")] = 3.0,
    model: Annotated[str, typer.Option(help="Fitted model to compare with.")] = "h100-llama70b",
) -> None:
    """Measure latency and power of prefill and decode iterations on one GPU, for `biscale fit --profile`."""
    need_extra()
    import pandas as pd

    from biscale_env.errors import BiscaleError
    from biscale_env.hardware.clocks import open_backend
    from biscale_env.hardware.profiler import (
        Profiler,
        ProfileSettings,
        decode_points,
        predictions,
        prefill_points,
        provenance,
        write_table,
    )

    if phase not in ("both", "prefill", "decode"):
        raise BiscaleError(f"unknown phase '{phase}': choose both, prefill or decode")
    if importlib.util.find_spec("torch") is None:
        raise BiscaleError("the profiler needs torch: pip install 'biscale-env[hw,rl]'")
    wanted = parse_clocks(clocks)
    settings = ProfileSettings(device=device, layers=layers, measure_s=measure_s, clocks_mhz=wanted)
    reader = None if backend == "none" else open_backend(backend, observe_only=not wanted)
    profiler = Profiler(settings, reader, gpu)
    points = []
    for degree in tp or [4, 8]:
        points += prefill_points(degree, quick) if phase != "decode" else []
        points += decode_points(degree, quick) if phase != "prefill" else []
    rows = []
    try:
        for row in profiler.measure(points):
            rows.append(row)
            write_table(out, rows, provenance(profiler))
            said = predictions(pd.DataFrame([row]), model).iloc[0]
            typer.echo(
                f"{row['phase']:7} tp{row['tp']} batch {row['batch']:3} new {row['new_tokens']:5} context {row['context']:6}: "
                f"{row['latency_s'] * 1e3:8.2f} ms (model {said['latency_s'] * 1e3:8.2f}), {row['power_w']:6.1f} W "
                f"(model {said['power_w']:6.1f}), {row['freq_mhz']:6.0f} MHz"
            )
    finally:
        if reader:
            reader.close()
    typer.echo(f"{len(rows)} points in {out}; fit them: biscale fit --profile {out}")


def parse_clocks(text: str) -> tuple[float, ...]:
    """Clocks of ``--clocks``; empty for ``default``.

    Raises:
        BiscaleError: neither ``default`` nor numbers.
    """
    from biscale_env.errors import BiscaleError

    if text == "default":
        return ()
    try:
        clocks = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BiscaleError(f"--clocks '{text}': write default, or clocks in MHz such as 810,1200,1980") from None
    if not all(100 <= c <= 4000 for c in clocks):
        raise BiscaleError(f"--clocks '{text}': these are not clocks of a GPU in MHz")
    return clocks
