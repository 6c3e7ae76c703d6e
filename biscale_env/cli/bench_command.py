"""`biscale bench`: the speed of everything that is used in a loop, against its targets."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from biscale_env.benchmarks.loops import Measurement

DECISIONS = (
    ("prefill", "mpc-dompc", "mpc_ms"),
    ("prefill", "mpc", "mpc_ms"),
    ("decode", "slack", "slack_us"),
)
TraceFile = Annotated[
    Path | None,
    typer.Option(help="Trace to run; by default an hour like the Azure conversation trace."),
]
ClusterOnly = Annotated[
    bool,
    typer.Option(
        "--cluster",
        help="Instead: cluster, tier 1, a day, the quick headline experiment (minutes).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _decisions() -> "Iterator[Measurement]":
    from biscale_env.benchmarks.loops import measure_decision
    from biscale_env.envs.plant import Plant, PlantSettings
    from controllers.base import context_of
    from controllers.registry import make_policy

    for phase, name, key in DECISIONS:
        plant = Plant(PlantSettings.of(phase))
        yield measure_decision(make_policy(name, context_of(plant)), plant, key, name)


def _agents() -> "Iterator[Measurement]":
    """Decisions of the shipped agents, and PPO's learning with the shipped prefill config (where
    torch is installed).
    """
    from importlib.util import find_spec

    from biscale_env.benchmarks.loops import cpu_seconds, figure, measure_decision
    from biscale_env.envs.plant import Plant, PlantSettings
    from biscale_env.evaluation.experiment.agent_jobs import AGENT, load_agent, ships
    from controllers.base import context_of

    for phase in filter(ships, ("prefill", "decode")):
        plant = Plant(PlantSettings.of(phase))
        yield measure_decision(
            load_agent(AGENT, context_of(plant)), plant, "agent_us", f"agent, {phase},"
        )
    if find_spec("stable_baselines3") is None:
        return
    from agents.training.mixture import make_groups
    from agents.training.run import make_model
    from agents.training.train_config import load_config
    from agents.training.training_env import AgentVecEnv

    config = load_config(None, "prefill")
    generated = tuple(
        part.model_copy(update={"workloads": 4}) for part in config.mixture if part.trace is None
    )
    config = config.model_copy(update={"mixture": generated, "anneal": False})
    model = make_model(config, AgentVecEnv(config, *make_groups(config), config.seed), None)
    steps = config.n_envs * int(config.hyper["n_steps"])
    best, median = cpu_seconds(lambda: model.learn(steps, reset_num_timesteps=False), windows=8)
    yield figure(
        "ppo_steps",
        f"PPO learns, prefill, {config.n_envs} copies, one core",
        "steps/s",
        steps / best,
        steps / median,
    )


def _measure(trace_file: Path | None) -> "Iterator[Measurement]":
    from biscale_env.benchmarks import loops
    from biscale_env.traces import read_trace

    yield loops.measure_import()
    yield from loops.measure_hour(
        read_trace(trace_file) if trace_file else loops.conversation_hour()
    )
    for phase in ("prefill", "decode"):
        yield loops.measure_vector(phase)
    for phase in ("prefill", "decode"):
        yield loops.measure_single(phase)
    yield from _decisions()
    yield from _agents()


def _line(figure: "Measurement") -> str:
    def short(value: float) -> str:
        return (
            f"{value / 1e6:.2f} M"
            if value >= 1e6
            else f"{value / 1e3:.0f} k"
            if value >= 1e4
            else f"{value:.3g}"
        )

    verdict = "met" if figure.ratio >= 1 else "MISSED"
    bound = "<=" if figure.better == "lower" else ">="
    return (
        f"{figure.name:66s} {short(figure.value):>9s} {figure.unit:8s} {bound} {short(figure.target):>8s}   "
        f"{figure.ratio:7.2f} x  {verdict}   ({figure.beside_is} {short(figure.beside)})"
    )


def bench(trace: TraceFile = None, cluster: ClusterOnly = False, as_json: Json = False) -> None:
    """Measure speed and print each figure with its target and ratio (above 1 is better than the
    target).
    """
    from biscale_env.benchmarks.cluster_loops import measure_cluster

    figures = []
    for figure in measure_cluster() if cluster else _measure(trace):
        figures.append(figure)
        if not as_json:
            typer.echo(_line(figure))
    if as_json:
        typer.echo(json.dumps([figure.as_dict() for figure in figures], indent=1))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)
