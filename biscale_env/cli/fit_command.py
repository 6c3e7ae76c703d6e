"""`biscale fit`: regenerate the shipped models, fit an own table, or compare with measurements."""

from pathlib import Path
from typing import Annotated

import typer

from biscale_env.core.errors import BiscaleError

DEFAULT_MODEL = "h100-llama70b"


def _report(name: str) -> None:
    from biscale_env.models.fit.validation import to_markdown, validation_frame

    typer.echo(to_markdown(validation_frame(name)))


def _family(name: str, out: Path | None, check: bool) -> None:
    from biscale_env.config import configs_dir
    from biscale_env.models.fit.shipped import fit_family, stale_files, write_family

    folder = out or configs_dir() / "models" / name
    files = fit_family(name)
    if not check:
        write_family(files, folder)
        typer.echo(f"wrote {len(files)} files to {folder}")
    elif stale := stale_files(files, folder):
        raise BiscaleError(
            f"{folder} is stale: {', '.join(stale)} differ from what `biscale fit` writes"
        )
    else:
        typer.echo(f"{folder} is what the profile and the evidence give")


def _user(
    profile: Path, power: Path | None, out: Path, base: str, gpu: str | None, llm: str | None
) -> None:
    from biscale_env.models.coefficient_files import stem
    from biscale_env.models.fit.shipped import write_family
    from biscale_env.models.fit.user_profile import fit_user

    fits = fit_user(profile, power, base, gpu=gpu, llm=llm)
    single = out.suffix in {".yaml", ".yml"}
    if single and len(fits) > 1:
        raise BiscaleError(
            f"{profile} holds {len(fits)} configurations: give --out a folder, not the file {out}"
        )
    for fit in fits:
        content = fit.content
        path = out if single else out / f"{stem(content.phase, content.dtype, content.tp)}.yaml"
        write_family(fit.files(path), path.parent)
        power_text = (
            "no power in the table"
            if fit.power_mape != fit.power_mape
            else f"power {fit.power_mape:.1%}"
        )
        typer.echo(f"{path}: held-out error, latency {fit.latency_mape:.1%}, {power_text}")


def fit(
    *,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Your own table: phase,tp,dtype,batch,new_tokens,prefix,context,latency_s,"
            "freq_mhz and perhaps power_w."
        ),
    ] = None,
    power: Annotated[
        Path | None, typer.Option(help="A second table with power_w, if it was measured apart.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File (.yaml) or folder to write.")] = None,
    model: Annotated[
        str, typer.Option(help="Family to regenerate, or in which your own fit starts.")
    ] = DEFAULT_MODEL,
    gpu: Annotated[
        str | None,
        typer.Option(help="GPU of your table, name or YAML file. [default: the model's]"),
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(help="LLM of your table, name or YAML file. [default: the model's]"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if the committed files differ.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Print model against measurement as markdown.")
    ] = False,
) -> None:
    """Fit the models: without options, regenerate the shipped coefficient files."""
    if profile is None and (gpu or llm):
        raise BiscaleError(
            "--gpu and --llm need --profile: they say what the table was measured on"
        )
    if report:
        _report(model)
    elif profile is None:
        if power is not None:
            raise BiscaleError("--power needs --profile: the power table completes a profile table")
        _family(model, out, check)
    elif out is None:
        raise BiscaleError(
            "--profile needs --out: a .yaml file, or a folder if the table holds several "
            "configurations"
        )
    else:
        _user(profile, power, out, model, gpu, llm)


def register(app: typer.Typer) -> None:
    """Add `biscale fit`."""
    app.command("fit")(fit)
