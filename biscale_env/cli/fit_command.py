"""`biscale fit`: regenerate the shipped models, fit an own table, or compare with measurements."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biscale_env.cli.comparison_options import Jobs, RayAddress
from biscale_env.core.errors import BiscaleError

if TYPE_CHECKING:
    from biscale_env.jobs.workers import Workers

DEFAULT_MODEL = "h100-sxm/llama-3.3-70b"


def _report() -> None:
    from biscale_env.models.fit.report import report_markdown

    typer.echo(report_markdown())


def _held_out(gpu: str | None, workers: "Workers") -> None:
    from biscale_env.jobs.progress import JobProgress
    from biscale_env.models.fit.gpu_evidence import known_evidence, load_gpu_evidence
    from biscale_env.models.fit.held_out import write_held_out

    for name in known_evidence() if gpu is None else [gpu]:
        ev = load_gpu_evidence(name)
        if ev.kernels.points or ev.serving.groups:
            with JobProgress(f"fits without an LLM of {name}", transient=True) as progress:
                path = write_held_out(name, workers, progress.tell)
            typer.echo(f"wrote {path}")


def _shipped(gpu: str | None, check: bool, workers: "Workers") -> None:
    from biscale_env.jobs.progress import JobProgress
    from biscale_env.models.fit.llm_files import stale_files, write_family
    from biscale_env.models.fit.shipped import fit_shipped

    stale: list[str] = []
    with JobProgress("members of ensembles", transient=True) as progress:
        for folder, files in fit_shipped(gpu, workers, progress.tell):
            if not check:
                write_family(files, folder)
                typer.echo(f"wrote {len(files)} files to {folder}")
            else:
                stale += [f"{folder.name}/{name}" for name in stale_files(files, folder)]
    if stale:
        raise BiscaleError(
            f"the shipped models are stale: {', '.join(stale)} differ from what `biscale fit` "
            "writes"
        )
    if check:
        typer.echo("the shipped models are what the kernel tables and the evidence give")


def _user(
    profile: Path, power: Path | None, out: Path, base: str, gpu: str | None, llm: str | None
) -> None:
    from biscale_env.models.coefficient_files import stem
    from biscale_env.models.fit.llm_files import write_family
    from biscale_env.models.fit.user_profile import fit_user

    fits = fit_user(profile, power, base, gpu=gpu, llm=llm)
    single = out.suffix in {".yaml", ".yml"}
    if single and len(fits) > 1:
        raise BiscaleError(
            f"{profile} holds {len(fits)} configurations: give --out a folder, not the file {out}"
        )
    for fit in fits:
        content = fit.content
        name = stem(content.phase, content.dtype, content.tp, content.ep)
        path = out if single else out / f"{name}.yaml"
        write_family(fit.files(path), path.parent)
        power_text = (
            "no power in the table"
            if fit.power_mape != fit.power_mape
            else f"power {fit.power_mape:.1%}"
        )
        typer.echo(f"{path}: held-out error, latency {fit.latency_mape:.1%}, {power_text}")


def _from_run(run: Path, profile: Path | None, out: Path | None, model: str | None) -> None:
    from biscale_env.cli.hw.observe_command import fit_from_run

    if profile is not None:
        raise BiscaleError("--from and --profile are two fits: give one of them")
    if out is None:
        raise BiscaleError("--from needs --out: the folder of the corrected model")
    fit_from_run(run, out, model)


def fit(
    *,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Your own table: phase,tp,dtype,batch,new_tokens,prefix,context,latency_s,"
            "freq_mhz and perhaps power_w."
        ),
    ] = None,
    from_run: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Correct a model by what a running engine told: a folder of `biscale hw observe`, "
            "`explore` or `replay`.",
        ),
    ] = None,
    power: Annotated[
        Path | None, typer.Option(help="A second table with power_w, if it was measured apart.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File (.yaml) or folder to write.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Family in which your own fit starts; default h100-sxm/llama-3.3-70b, with --from "
            "that of the run."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="GPU of your table, name or YAML file; without a table: the one GPU to fit anew."
        ),
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(help="LLM of your table, name or YAML file; default: the model's."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if the committed files differ.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Print model against measurement as markdown.")
    ] = False,
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out",
            help="Measure errors on LLMs and clocks that the fit is not shown; minutes per GPU.",
        ),
    ] = False,
    jobs: Jobs = None,
    ray: RayAddress = None,
) -> None:
    """Fit the models: without options, regenerate the shipped coefficient files."""
    from biscale_env.jobs.workers import Workers

    workers = Workers.of(jobs, ray)
    if (jobs is not None or ray is not None) and (from_run or profile or report):
        raise BiscaleError(
            "--jobs and --ray belong to the shipped models and --held-out: other fits take seconds"
        )
    if from_run is not None:
        _from_run(from_run, profile, out, model)
        return
    if profile is None and (llm or out):
        raise BiscaleError("--llm and --out need --profile: they belong to an own table")
    if report:
        _report()
    elif held_out:
        _held_out(gpu, workers)
    elif profile is None:
        if power is not None:
            raise BiscaleError("--power needs --profile: the power table completes a profile table")
        _shipped(gpu, check, workers)
    elif out is None:
        raise BiscaleError(
            "--profile needs --out: a .yaml file, or a folder if the table holds several "
            "configurations"
        )
    else:
        _user(profile, power, out, model or DEFAULT_MODEL, gpu, llm)


def register(app: typer.Typer) -> None:
    """Add `biscale fit`."""
    app.command("fit")(fit)
