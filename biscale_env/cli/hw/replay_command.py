"""``biscale replay`` and ``biscale validate``."""

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biscale_env.cli.hw import replay_options as options
from biscale_env.cli.hw.deployment_command import AtMachine, replay_deployment
from biscale_env.cli.hw.hw_options import (
    SOCKETS,
    ApiKey,
    Backend,
    Delay,
    Dtype,
    Instance,
    Lease,
    LookAhead,
    MaxSeqs,
    Means,
    Model,
    Slo,
    TokenBudget,
    Tp,
    instance_of,
    need_extra,
    need_hardware,
    parse_groups,
)
from biscale_env.cli.instance_options import EpDegree, GpuName, LlmName
from biscale_env.cli.trace_options import reads_trace

if TYPE_CHECKING:
    from rich.console import Console

    from biscale_env.hardware.replay.measured_run import MeasuredRun
    from biscale_env.traces.reading.reading_options import ReadingOptions


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("replay")(replay_command)
    app.command("validate")(validate_command)


@reads_trace
def replay_command(
    *,
    trace: options.TraceName,
    decode: options.DecodeUrl = None,
    deployment: options.DeploymentOption = None,
    at: AtMachine = None,
    policy: options.Policies = ["biscale"],  # noqa: B006 - typer copies it
    prefill: options.PrefillUrl = None,
    engine: options.EngineLabel = "vllm",
    backend: Backend = "nvml",
    gpus: options.GpusOfPhases = None,
    observe_only: options.ObserveOnly = False,
    actuator: options.OwnActuator = True,
    sockets: options.HookSockets = SOCKETS,
    out: options.RunFolder = Path("runs/replay"),
    duration: options.Duration = None,
    rate: options.Rate = None,
    seed: options.ThinningSeed = 0,
    instance: Instance = None,
    gpu: GpuName = None,
    llm: LlmName = None,
    model: Model = None,
    tp: Tp = None,
    ep: EpDegree = None,
    dtype: Dtype = None,
    slo: Slo = None,
    token_budget: TokenBudget = None,
    max_seqs: MaxSeqs = None,
    delay: Delay = None,
    lease: Lease = 1.5,
    vocabulary: options.Vocabulary = 32_000,
    stall: options.Stall = 30.0,
    api_key: ApiKey = None,
    look_ahead: LookAhead = True,
    means: Means = "lock",
    wait: options.Wait = 0.0,
    reading: "ReadingOptions",
) -> None:
    """Replay a trace against a running engine while a policy controls the clocks.

    Write a run directory.
    """
    need_hardware()
    from biscale_env.cli.hw.replay_progress import replay_progress
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.replay import measured_run
    from biscale_env.hardware.replay.closed_loop import (
        ReplaySettings,
        policies_by_phase,
        wait_for_engines,
    )

    if deployment is not None:
        load = measured_run.trace_to_replay(trace, duration, rate, seed, reading)
        measured_run.must_be_free(out)
        replay_deployment(deployment, at, load, out, (vocabulary, stall, wait), api_key)
        return
    if decode is None:
        raise BiscaleError("nothing to replay against: give --decode URL or --deployment FILE")
    limits = {"tp": tp, "ep": ep, "dtype": dtype}
    limits |= {"token_budget": token_budget, "max_seqs": max_seqs}
    spec = instance_of(instance, gpu=gpu, llm=llm, model=model, slo=slo, **limits)
    phases = ("prefill", "decode") if prefill else ("decode",)
    groups = parse_groups(
        gpus or [f"prefill=0-{spec.tp - 1}", f"decode={spec.tp}-{2 * spec.tp - 1}"]
    )
    settings = ReplaySettings(
        policies=policies_by_phase(list(policy), phases),
        decode_url=decode,
        prefill_url=prefill,
        gpus=measured_run.gpus_of_phases(groups, phases),
        backend=backend,
        engine=engine,
        sockets=sockets.absolute(),
        own_actuator=actuator,
        observe_only=observe_only,
        instance=spec,
        delay_s=delay,
        lease_s=lease,
        vocabulary=vocabulary,
        stall_s=stall,
        api_key=api_key,
        look_ahead=look_ahead,
        means=means,
    )
    load = measured_run.trace_to_replay(trace, duration, rate, seed, reading)
    measured_run.must_be_free(out)
    wait_for_engines([url for url in (prefill, decode) if url], wait, api_key)
    with replay_progress(len(load)) as tell:
        done = measured_run.run_replay(settings, load, out, tell)
    _tell(done)
    done.raise_trouble()


def _tell(done: "MeasuredRun") -> None:
    """Print metrics, latencies of the loop and problems."""
    from rich.console import Console

    from biscale_env.hardware.replay.closed_loop import INTERRUPTED

    console = Console()
    _tell_results(console, done)
    for problem in done.outcome.problems:
        console.print(f"[yellow]{problem}[/]")
    if done.outcome.gone == INTERRUPTED:
        console.print(f"interrupted; clocks are restored, what was measured is in {done.out}")


def _tell_results(console: "Console", done: "MeasuredRun") -> None:
    from rich.table import Table

    rows = done.view.results.to_dict("records")
    names = ("phase", "policy", "sent", "failed", "P50", "P99", "SLO attainment", "energy")
    table = Table(*names, "per output token", title=str(done.out))
    for row in rows:
        metric = "ttft" if row["phase"] == "prefill" else "tpot"
        table.add_row(
            row["phase"],
            row["policy"],
            str(len(done.raw.requests)),
            str(row["failed_requests"]),
            _or_unknown(row[f"{metric}_p50_s"], "{:.1f} ms", 1e3),
            _or_unknown(row[f"{metric}_p99_s"], "{:.1f} ms", 1e3),
            _or_unknown(row["attainment"], "{:.2%}"),
            _or_unknown(row["energy_j"], "{:,.0f} J"),
            _or_unknown(row["energy_per_output_token_j"], "{:.3f} J"),
        )
    console.print(table)
    for text in _unknown_tpots(done):
        console.print(f"[yellow]{text}[/]")
    for row in rows:
        console.print(_latencies(row), highlight=False)


def _unknown_tpots(done: "MeasuredRun") -> list[str]:
    """Why the TPOT of some streams is not known."""
    requests = [r for r in done.raw.requests if not r.failed and r.output_tokens > 1]
    counts = {
        "came in one piece, something between engine and client buffers them": sum(
            r.in_one_piece for r in requests
        ),
        "came without a count of tokens (`usage`)": sum(
            r.uncounted and not r.in_one_piece for r in requests
        ),
    }
    return [
        f"{count} of {len(done.raw.requests)} streams {why}: their TPOT is unknown and not judged"
        for why, count in counts.items()
        if count
    ]


def _latencies(row: dict[Hashable, Any]) -> str:
    """Latencies of the loop that controlled one phase."""
    told = (
        f"{row['phase']}: record to command P99 "
        f"{_or_unknown(row['record_to_command_p99_s'], '{:.2f} ms', 1e3)}, clock seen after median "
        f"{_or_unknown(row['actuation_delay_median_s'], '{:.0f} ms', 1e3)}, "
        f"records lost {row.get('records_lost', 0):.0f}"
    )
    if row["hook_p50_s"] > 0:
        told += (
            f", hook {row['hook_p50_s'] * 1e6:.0f} us per iteration "
            f"(P99 {row['hook_p99_s'] * 1e6:.0f} us)"
        )
    return told


def _or_unknown(value: float, form: str, scale: float = 1.0) -> str:
    """A number, unless it is not known."""
    return "unknown" if value != value else form.format(scale * value)


def validate_command(
    run: Annotated[Path, typer.Argument(help="Run directory of a replay.")],
    strict: Annotated[bool, typer.Option(help="Exit code 2 when a tolerance is missed.")] = False,
) -> None:
    """Simulate the trace of a replay with the same decisions, and show both side by side."""
    need_extra()
    from rich.console import Console
    from rich.table import Table

    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.deploy.deployed_raw import DeployedRaw, is_deployed, read_deployed
    from biscale_env.hardware.deploy.deployed_validate import compare_deployed
    from biscale_env.hardware.replay.raw_log import Raw, read_raw
    from biscale_env.hardware.replay.validate import compare

    raw: Raw | DeployedRaw
    if is_deployed(run / "raw"):
        raw = read_deployed(run / "raw")
        rows = compare_deployed(raw)
    else:
        raw = read_raw(run / "raw")
        rows = compare(raw)
    names = ("phase", "quantity", "measured", "simulated", "deviation", "within")
    table = Table(*names, title=f"simulation against {run}")
    for row in rows:
        asked = "" if row.tolerance != row.tolerance else f"({row.tolerance:.0%})"
        within = f"{'yes' if row.agrees else 'NO'} {asked}" if asked else ""
        numbers = f"{row.measured:,.5g}", f"{row.simulated:,.5g}", f"{row.deviation:+.2%}"
        table.add_row(row.phase, row.quantity, *numbers, within)
    console = Console()
    console.print(table)
    for phase, late_s in (raw.facts.get("lateness_p99_s") or {}).items():
        console.print(
            f"the emulated {phase} engine answered up to {late_s * 1e3:.1f} ms late (P99); "
            "a busy machine does that",
            highlight=False,
        )
    missed = [row for row in rows if not row.agrees]
    if missed and strict:
        raise BiscaleError(
            f"{missed[0].phase} {missed[0].quantity} deviates by {missed[0].deviation:+.1%}, "
            f"asked was {missed[0].tolerance:.0%}"
        )
