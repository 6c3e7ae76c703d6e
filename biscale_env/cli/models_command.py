"""`biscale models`: what is shipped, what it rests on, and models of any LLM on any GPU."""

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from biscale_env.core.errors import BiscaleError, BiscaleWarning

if TYPE_CHECKING:
    from biscale_env.models.build.build_model import BuiltModel
    from biscale_env.models.build.catalogue import Description, Entry

SOURCE_WIDTH: Final = 100  # characters of a source; --json has all of it
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _entry_line(e: "Entry") -> str:
    errors = f"{_percent(e.prefill_error)} / {_percent(e.decode_error)}"
    return f"{e.name:28s} {errors:16s} {e.kernels:10s} {e.power:34s} {', '.join(e.configurations)}"


def list_models(as_json: Json = False) -> None:
    """List the shipped models with held-out errors (prefill / decode) and what they rest on."""
    from biscale_env.models.build.catalogue import catalogue

    entries = catalogue()
    if as_json:
        typer.echo(json.dumps([asdict(e) for e in entries], indent=2))
        return
    head = ("model", "held-out error", "kernels", "power", "configurations")
    typer.echo(f"{head[0]:28s} {head[1]:16s} {head[2]:10s} {head[3]:34s} {head[4]}")
    for e in entries:
        typer.echo(_entry_line(e))


def _description_text(d: "Description") -> str:
    lines = [
        f"{d.entry.name}: kernels {d.entry.kernels}, power {d.entry.power}",
        "",
        f"{'phase':8s} {'configuration':15s} {'points':>7s} {'held out':>8s} {'error':>6s} "
        f"{'worst':>6s} {'estimated':>9s} {'members':>7s}",
    ]
    lines += [
        f"{row['phase']:8s} {row['configuration']:15s} {row['train_points'] or 0:7d} "
        f"{row['held_out_points'] or 0:8d} {_percent(row['held_out_mape']):>6s} "
        f"{_percent(row['held_out_max_error']):>6s} {_percent(row['estimated_share']):>9s} "
        f"{row['members']:7d}"
        for row in d.files
    ]
    lines += ["", f"coefficients of {d.shown}:"]
    for c in d.coefficients:
        source = textwrap.shorten(c["source"], SOURCE_WIDTH, placeholder=" ...")
        lines.append(f"  {c['name']:22s} {c['value']:12.5g}  {c['provenance']:9s} {source}")
    lines += ["", f"assumed: {', '.join(d.assumed) or 'nothing'}"]
    return "\n".join(lines)


def describe(
    name: Annotated[str, typer.Argument(help="Model family, e.g. h100-sxm/llama-3.3-70b.")],
    file: Annotated[
        str | None,
        typer.Option(help="File whose coefficients are shown; default: the first of decode."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what a model rests on: coefficients, evidence, errors, ensemble, assumptions."""
    from biscale_env.models.build.catalogue import describe as described

    d = described(name, file)
    typer.echo(json.dumps(asdict(d), indent=2) if as_json else _description_text(d))


def _built_text(made: "BuiltModel", out: Path) -> list[str]:
    lines = [f"{made.family}: {made.source}"]
    for c in made.contents:
        told = (
            f"held-out error {_percent(c.fit['held_out_mape'])}, "
            f"{_percent(c.fit['estimated_share'])} of the kernel time estimated"
        )
        lines.append(f"  {c.phase:8s} {c.dtype} TP {c.tp}, EP {c.ep}: {told}")
    lines.append(f"wrote {len(made.files)} files to {out}: use it with --model {out}")
    return lines


def _warn_of(made: "BuiltModel", asked_for_roofline: bool) -> None:
    import warnings

    from biscale_env.models.build.table_package import tables_installed

    if not made.measured and not asked_for_roofline:
        why = "kernel tables do not have this GPU"
        if not tables_installed():
            why = "kernel tables are not installed (pip install 'biscale-env[tables]')"
        warnings.warn(
            f"{why}: times are counted from data sheets, nothing is measured, and the ensemble is "
            "wider",
            BiscaleWarning,
            stacklevel=2,
        )
    if made.borrowed:
        warnings.warn(
            "power and clock behaviour of this GPU are borrowed from another one by data sheet: "
            "all of it is assumed, and the ensemble is wider",
            BiscaleWarning,
            stacklevel=2,
        )


def build_command(
    *,
    llm: Annotated[
        str,
        typer.Option(
            help="Name (qwen3-14b, Qwen/Qwen3-14B), or path of a Hugging Face config.json."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    gpu: Annotated[str, typer.Option(help="GPU, name or YAML file.")] = "h100-sxm",
    tp: Annotated[list[int] | None, typer.Option(min=1, help="TP degree; may be repeated.")] = None,
    ep: Annotated[int, typer.Option(min=1, help="Groups that experts are spread over.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp8 or mxfp4; default: as the LLM is published.")
    ] = None,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Count kernel times from data sheets alone.")
    ] = False,
) -> None:
    """Build the model of any LLM on any GPU from measured kernels."""
    from biscale_env.models.build.build_model import build_model
    from biscale_env.models.fit.llm_files import write_family
    from biscale_env.models.gpu_layer import DTYPES

    known = next((name for name in DTYPES if name == dtype), None)
    if known != dtype:
        raise BiscaleError(f"unknown dtype '{dtype}': choose {', '.join(DTYPES)}")
    if out.exists() and not out.is_dir():
        raise BiscaleError(f"--out must be a folder, but {out} is a file")
    made = build_model(llm, gpu, tp or [1], ep, known, roofline, lambda s: typer.echo(s, err=True))
    _warn_of(made, roofline)
    write_family(made.files, out)
    for line in _built_text(made, out):
        typer.echo(line)


def tables(
    only: Annotated[str | None, typer.Option("--gpu", help="One GPU alone.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; default: configs/models/profiles.")
    ] = None,
) -> None:
    """Write the shipped kernel tables anew (needs the extra `tables`)."""
    from biscale_env.models.build.shipped_tables import write_shipped
    from biscale_env.models.fit.kernel_profiles import profiles_dir

    written = write_shipped(out or profiles_dir(), only, lambda s: typer.echo(s, err=True))
    typer.echo(f"wrote {len(written)} tables")


def register(app: typer.Typer) -> None:
    """Add `biscale models list | describe | build | tables`."""
    group = typer.Typer(help="Models of LLMs on GPUs.", no_args_is_help=True)
    group.command("list")(list_models)
    group.command("describe")(describe)
    group.command("build")(build_command)
    group.command("tables")(tables)
    app.add_typer(group, name="models")
