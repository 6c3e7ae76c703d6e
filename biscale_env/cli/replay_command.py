"""``biscale replay`` and ``biscale validate``."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biscale_env.cli.hw_options import SOCKETS, need_extra, need_hardware, parse_groups

if TYPE_CHECKING:
    from biscale_env.hardware.replay.assemble import Raw
    from biscale_env.hardware.replay.closed_loop import ReplayOutcome, ReplaySettings
    from biscale_env.traces import Trace


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("replay")(replay_command)
    app.command("validate")(validate_command)


def replay_command(
    trace: Annotated[str, typer.Option(help="Trace: file or name.")],
    decode: Annotated[
        str, typer.Option(help="Address of the engine that streams (decode pool or router).")
    ],
    policy: Annotated[
        list[str],
        typer.Option(
            help="biscale, mpc, slack, static:1200, CHECKPOINT, recorded.parquet, or PHASE=POLICY; repeatable."
        ),
    ] = ["biscale"],  # noqa: B006 - typer copies it
    prefill: Annotated[str | None, typer.Option(help="Address of the prefill engine.")] = None,
    engine: Annotated[
        str, typer.Option(help="vllm, sglang, dynamo or emulated: a label in the results.")
    ] = "vllm",
    backend: Annotated[str, typer.Option(help="nvml, zeusd[:SOCKET] or fake:STATE_FILE.")] = "nvml",
    gpus: Annotated[
        list[str] | None,
        typer.Option(help="GPUs per phase; default prefill=0-3 and decode=4-7 (with TP 4)."),
    ] = None,
    observe_only: Annotated[bool, typer.Option(help="Decide and log, set no clock.")] = False,
    actuator: Annotated[
        bool,
        typer.Option(
            help="Start an actuator; --no-actuator uses one that runs on these sockets already."
        ),
    ] = True,
    sockets: Annotated[
        Path, typer.Option(help="Folder of the sockets that the engine's hooks use.")
    ] = SOCKETS,
    out: Annotated[Path, typer.Option(help="Run directory to write.")] = Path("runs/replay"),
    duration: Annotated[
        float | None, typer.Option(help="ClosedLoopReplay this many seconds of the trace.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Choose requests to this mean rate, requests/s.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of requests.")] = 0,
    slo: str = "biscale",
    model: str = "h100-llama70b",
    tp: int = 4,
    dtype: str = "bf16",
    token_budget: int = 2048,
    max_seqs: int = 256,
    delay: Annotated[
        float | None, typer.Option(help="Expected actuation delay, s; default the model's.")
    ] = None,
    lease: float = 1.5,
    vocabulary: Annotated[int, typer.Option(help="Token ids are drawn below this.")] = 32_000,
    stall: Annotated[
        float, typer.Option(help="Seconds of silence after which the engine counts as gone.")
    ] = 30.0,
    wait: Annotated[
        float,
        typer.Option(help="Wait so many seconds at most for engines that are still starting."),
    ] = 0.0,
) -> None:
    """ClosedLoopReplay a trace against a running engine while a policy controls the clocks.

    Write a run directory.
    """
    need_hardware()
    from biscale_env.hardware.replay.closed_loop import (
        ReplaySettings,
        policies_by_phase,
        wait_for_engines,
    )

    phases = ("prefill", "decode") if prefill else ("decode",)
    groups = parse_groups(gpus or [f"prefill=0-{tp - 1}", f"decode={tp}-{2 * tp - 1}"])
    settings = ReplaySettings(
        policies=policies_by_phase(list(policy), phases), decode_url=decode, prefill_url=prefill, gpus=_groups_of(groups, phases),
        backend=backend, engine=engine, sockets=sockets.absolute(), own_actuator=actuator, observe_only=observe_only, slo=slo,
        model=model, tp=tp, dtype=dtype, token_budget=token_budget, max_seqs=max_seqs, delay_s=delay, lease_s=lease,
        vocabulary=vocabulary, stall_s=stall,
    )  # fmt: skip
    load = _load_of(trace, duration, rate, seed)
    _must_be_free(out)
    wait_for_engines([url for url in (prefill, decode) if url], wait)
    outcome, raw = run_replay(settings, load, out)
    _tell(raw, outcome, out)


def _groups_of(
    groups: dict[str, tuple[str, ...]], phases: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    from biscale_env.core.errors import BiscaleError

    missing = [phase for phase in phases if phase not in groups]
    if missing:
        raise BiscaleError(f"--gpus names no GPUs for {missing[0]}: add --gpus {missing[0]}=...")
    return {phase: groups[phase] for phase in phases}


def _must_be_free(out: Path) -> None:
    """A replay measures once: it cannot take up what an earlier one left behind."""
    from biscale_env.core.errors import BiscaleError
    from biscale_env.evaluation.runs.run_files import CONFIG

    if (out / CONFIG).is_file():
        raise BiscaleError(f"{out} holds a run already; choose another --out")


def _load_of(name: str, duration: float | None, rate: float | None, seed: int) -> "Trace":
    from biscale_env.core.errors import BiscaleError
    from biscale_env.traces import load_named, read_trace

    trace = read_trace(Path(name)) if Path(name).exists() else load_named(name)
    if rate is not None:
        trace = trace.scaled_to(rate, seed)
    if duration is not None:
        trace = trace.window(0.0, duration)
    if not len(trace):
        raise BiscaleError(
            f"{name}: no request within the first {duration:g} s: use a longer --duration"
        )
    return trace


def run_replay(
    settings: "ReplaySettings", trace: "Trace", out: Path
) -> "tuple[ReplayOutcome, Raw]":
    """ClosedLoopReplay into a run directory.

    What was measured is kept when the engine goes away midway.

    Raises:
        BiscaleError: something does not start, or the engine went away.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from biscale_env.evaluation.report.page import write_report
    from biscale_env.evaluation.runs.run_view import load_run
    from biscale_env.evaluation.runs.rundir import RunDirectory
    from biscale_env.hardware.replay.assemble import read_raw, run_record
    from biscale_env.hardware.replay.closed_loop import ClosedLoopReplay

    columns = (
        TextColumn("replaying"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    failed = 0
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("replay", total=len(trace), failed="")

        def tell(record: Any) -> None:
            nonlocal failed
            failed += bool(record.error)
            bar.update(task, advance=1, failed=f"{failed} failed" if failed else "")

        config = {
            "replay": settings.plain(),
            "trace": {"name": trace.name, "source": trace.source, "requests": len(trace)},
        }
        raw_folder = out / "raw"
        replay = ClosedLoopReplay(settings, trace, raw_folder, tell)
        empty = not (out.is_dir() and any(out.iterdir()))
        try:
            with RunDirectory(out, config, inputs={f"trace {trace.name}": trace.sha256}) as run:
                outcome = replay.run()
                raw = read_raw(raw_folder)
                for phase in raw.phases:
                    run.add(run_record(raw, phase, replay.plants[phase].gpu.freq_max_mhz))
        except BaseException:
            log = raw_folder / "requests.jsonl"
            if empty and not (
                log.is_file() and log.stat().st_size
            ):  # nothing was measured: the same command may be given again
                shutil.rmtree(out, ignore_errors=True)
            raise
    write_report(load_run(out))
    return outcome, raw


def _tell(raw: "Raw", outcome: "ReplayOutcome", out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from biscale_env.core.errors import BiscaleError
    from biscale_env.evaluation.runs.run_view import load_run
    from biscale_env.hardware.replay.closed_loop import INTERRUPTED

    table = Table(
        "phase",
        "policy",
        "sent",
        "P50",
        "P99",
        "SLO met",
        "energy",
        "per output token",
        title=str(out),
    )
    for row in load_run(out).results.to_dict("records"):
        metric = "ttft" if row["phase"] == "prefill" else "tpot"
        table.add_row(
            row["phase"], row["policy"], str(len(raw.requests)), f"{row[f'{metric}_p50_s'] * 1e3:.1f} ms",
            f"{row[f'{metric}_p99_s'] * 1e3:.1f} ms", f"{row['attainment']:.2%}", f"{row['energy_j']:,.0f} J",
            f"{row['energy_per_output_token_j']:.3f} J",
        )  # fmt: skip
    console = Console()
    console.print(table)
    for row in load_run(out).results.to_dict("records"):
        told = (
            f"{row['phase']}: record to command P99 {row['record_to_command_p99_s'] * 1e3:.2f} ms, clock seen after median "
            f"{row['actuation_delay_median_s'] * 1e3:.0f} ms, records lost {row.get('records_lost', 0):.0f}"
        )
        if row["hook_p50_s"] > 0:
            told += f", hook {row['hook_p50_s'] * 1e6:.0f} us per iteration (P99 {row['hook_p99_s'] * 1e6:.0f} us)"
        console.print(told, highlight=False)
    for problem in outcome.problems:
        console.print(f"[yellow]{problem}[/]")
    if outcome.gone == INTERRUPTED:
        console.print(f"interrupted; clocks are restored, what was measured is in {out}")
        raise KeyboardInterrupt
    if outcome.gone:
        raise BiscaleError(f"{outcome.gone}; clocks are restored, what was measured is in {out}")
    if outcome.failed:
        raise BiscaleError(f"{outcome.failed}; clocks are restored, what was measured is in {out}")
    failed = [r for r in raw.requests if r.error]
    if failed:
        raise BiscaleError(
            f"{len(failed)} of {len(raw.requests)} requests failed, the first: {failed[0].error}; see {out}/raw"
        )


def validate_command(
    run: Annotated[Path, typer.Argument(help="Run directory of a replay.")],
    strict: Annotated[bool, typer.Option(help="Exit code 2 when a tolerance is missed.")] = False,
) -> None:
    """Simulate the trace of a replay with the same decisions, and show both side by side."""
    need_extra()
    from rich.console import Console
    from rich.table import Table

    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.replay.assemble import read_raw
    from biscale_env.hardware.replay.validate import compare

    raw = read_raw(run / "raw")
    rows = compare(raw)
    table = Table(
        "phase",
        "quantity",
        "measured",
        "simulated",
        "deviation",
        "within",
        title=f"simulation against {run}",
    )
    for row in rows:
        asked = (
            ""
            if row.tolerance != row.tolerance
            else f"{'yes' if row.agrees else 'NO'} ({row.tolerance:.0%})"
        )
        table.add_row(
            row.phase,
            row.quantity,
            f"{row.measured:,.5g}",
            f"{row.simulated:,.5g}",
            f"{row.deviation:+.2%}",
            asked,
        )
    console = Console()
    console.print(table)
    for phase, late_s in (raw.facts.get("lateness_p99_s") or {}).items():
        console.print(
            f"the emulated {phase} engine answered up to {late_s * 1e3:.1f} ms late (P99); a busy machine does that",
            highlight=False,
        )
    missed = [row for row in rows if not row.agrees]
    if missed and strict:
        raise BiscaleError(
            f"{missed[0].phase} {missed[0].quantity} deviates by {missed[0].deviation:+.1%}, asked was {missed[0].tolerance:.0%}"
        )
