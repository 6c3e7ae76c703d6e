"""`biscale predict`: latency, power and energy of iterations and of one GEMM."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biscale_env.cli.instance_options import describes_instance

if TYPE_CHECKING:
    from biscale_env.config import InstanceSpec
    from biscale_env.models import IterationModel
    from biscale_env.models.predict import Prediction

Clock = Annotated[
    float | None, typer.Option(help="Requested SM clock, MHz; default: the GPU's highest.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


OF_AN_INSTANCE = ("gpu", "llm", "model", "tp", "ep", "dtype")


def _model(phase: str, given: dict[str, Any]) -> tuple["IterationModel", "InstanceSpec"]:
    from biscale_env.config import InstanceSpec
    from biscale_env.models import instance_model

    instance = InstanceSpec.of(**given)
    return instance_model(phase, instance), instance


def _band(p: "Prediction", key: str, scale: float, digits: int) -> str:
    if not p.spread:
        return ""
    low, high = p.spread[key]["p5"] * scale, p.spread[key]["p95"] * scale
    return f"   (ensemble p5-p95: {low:.{digits}f} to {high:.{digits}f})"


def _text(p: "Prediction") -> str:
    domain = "the validity domain of the fit"
    where = f"inside {domain}" if p.inside_box else f"OUTSIDE {domain}: an extrapolation"
    chunks = f" in {p.iterations} batches" if p.iterations > 1 else ""
    return "\n".join(
        [
            f"{p.phase} {p.dtype} TP {p.tp} on {p.model}, {p.tokens} tokens{chunks}, {where}",
            f"  latency          {p.latency_s * 1e3:9.2f} ms{_band(p, 'latency_s', 1e3, 2)}",
            f"  power per GPU    {p.power_w:9.1f} W{_band(p, 'power_w', 1.0, 1)}",
            f"  energy, {p.tp} GPUs   {p.energy_j:9.2f} J{_band(p, 'energy_j', 1.0, 2)}",
            f"  energy per token {p.energy_per_token_j:9.4f} J",
            f"  effective clock  {p.freq_effective_mhz:9.0f} MHz"
            f"{_band(p, 'freq_effective_mhz', 1.0, 0)}",
            f"  requested clock  {p.freq_requested_mhz:9.0f} MHz",
            f"  best clock       {p.freq_best_mhz:9.0f} MHz (least energy for this work)",
        ]
    )


def _show(p: "Prediction", as_json: bool) -> None:
    typer.echo(json.dumps(p.as_dict(), indent=2) if as_json else _text(p))


@describes_instance(*OF_AN_INSTANCE)
def prefill(
    *,
    tokens: Annotated[int, typer.Option(help="New prompt tokens of all requests.")],
    requests: Annotated[int, typer.Option(help="Prompts, of equal length.")] = 1,
    prefix: Annotated[int, typer.Option(help="Tokens per prompt that are cached already.")] = 0,
    budget: Annotated[
        int | None,
        typer.Option("--token-budget", min=1, help="New tokens per batch; default: 2048."),
    ] = None,
    one_batch: Annotated[
        bool, typer.Option("--one-batch", help="All tokens in one batch, whatever the budget.")
    ] = False,
    clock: Clock = None,
    as_json: Json = False,
    instance: dict[str, Any],
) -> None:
    """Predict prompts as the engine runs them: in batches of its token budget."""
    from biscale_env.models.predict import check_prefill, predict, predict_prefill
    from biscale_env.sim.prefill_plan import equal_prompts, prefill_batches

    limit = {} if budget is None else {"token_budget": budget}
    fitted, spec = _model("prefill", instance | limit)
    freq = _clock(fitted, clock)
    if one_batch:
        _show(predict_prefill(fitted, tokens, requests, prefix, freq), as_json)
        return
    check_prefill(fitted, tokens, requests, prefix)
    prompts = equal_prompts(tokens, requests)
    works = prefill_batches(prompts, spec.token_budget, spec.max_seqs, prefix)
    _show(predict(fitted, works, freq), as_json)


@describes_instance(*OF_AN_INSTANCE)
def decode(
    *,
    batch: Annotated[int, typer.Option(help="Running requests.")],
    context: Annotated[int, typer.Option(help="KV-cache tokens per request.")] = 1024,
    clock: Clock = None,
    as_json: Json = False,
    instance: dict[str, Any],
) -> None:
    """Predict one decode iteration."""
    from biscale_env.models.predict import predict_decode

    fitted, _ = _model("decode", instance)
    _show(predict_decode(fitted, batch, context, _clock(fitted, clock)), as_json)


def gemm(
    *,
    rows: Annotated[float, typer.Option(help="Rows of the activations (M).")],
    k: Annotated[float, typer.Option(help="Inner dimension.")],
    n: Annotated[float, typer.Option(help="Columns of the weights.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp8, or mxfp4 weights.")] = "bf16",
    gpu: Annotated[str, typer.Option(help="GPU with a fitted layer, name or YAML file.")] = (
        "h100-sxm"
    ),
    clock: Clock = None,
    as_json: Json = False,
) -> None:
    """Predict one GEMM on one GPU: how its layer is held against measured kernels."""
    from dataclasses import asdict

    from biscale_env.models.gemm import predict_gemm

    r = predict_gemm(gpu, rows, k, n, dtype, clock)
    if as_json:
        told = {"gpu": gpu, "dtype": dtype, "rows": rows, "k": k, "n": n, **asdict(r)}
        typer.echo(json.dumps(told, indent=2))
        return
    typer.echo(f"{dtype} GEMM {rows:g} x {k:g} x {n:g} on {gpu}")
    typer.echo(f"  time             {r.time_s * 1e6:9.1f} us")
    typer.echo(f"  power            {r.power_w:9.1f} W")
    typer.echo(f"  rate             {r.tflops:9.1f} TFLOP/s")
    typer.echo(f"  energy           {r.energy_per_tflop_j:9.3f} J per TFLOP")
    typer.echo(f"  effective clock  {r.freq_effective_mhz:9.0f} MHz")


def _clock(model: "IterationModel", clock: float | None) -> float:
    return model.gpu.freq_max_mhz if clock is None else clock


def register(app: typer.Typer) -> None:
    """Add `biscale predict prefill`, `decode` and `gemm`."""
    group = typer.Typer(help="Latency, power and energy of the work.", no_args_is_help=True)
    group.command("prefill")(prefill)
    group.command("decode")(decode)
    group.command("gemm")(gemm)
    app.add_typer(group, name="predict")
