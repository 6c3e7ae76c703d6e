"""The options of ``biscale replay`` that no other command has."""

from pathlib import Path
from typing import Annotated

import typer

TraceName = Annotated[str, typer.Option("--trace", help="Trace: file or name.")]
DecodeUrl = Annotated[
    str | None, typer.Option(help="Address of the engine that streams (decode pool or router).")
]
DeploymentOption = Annotated[
    str | None,
    typer.Option(help="Replay on a deployment that is up; its file says all but the load."),
]
Policies = Annotated[
    list[str],
    typer.Option(
        help="biscale, mpc, slack, static:1200, agent, CHECKPOINT, module:Class, "
        "recorded.parquet, or PHASE=POLICY; repeatable."
    ),
]
PrefillUrl = Annotated[str | None, typer.Option(help="Address of the prefill engine.")]
EngineLabel = Annotated[
    str, typer.Option(help="vllm, sglang, dynamo or emulated: a label in the results.")
]
GpusOfPhases = Annotated[
    list[str] | None,
    typer.Option(help="GPUs per phase; default prefill=0-3 and decode=4-7 (with TP 4)."),
]
ObserveOnly = Annotated[bool, typer.Option(help="Decide and log, set no clock.")]
OwnActuator = Annotated[
    bool,
    typer.Option(
        help="Start an actuator; --no-actuator uses one that runs on these sockets already."
    ),
]
HookSockets = Annotated[
    Path, typer.Option(help="Folder of the sockets that the engine's hooks use.")
]
RunFolder = Annotated[Path, typer.Option(help="Run directory to write.")]
Duration = Annotated[float | None, typer.Option(help="Replay this many seconds of the trace.")]
Rate = Annotated[float | None, typer.Option(help="Thin the trace to this mean rate, requests/s.")]
ThinningSeed = Annotated[int, typer.Option(help="Of the thinning.")]
Vocabulary = Annotated[int, typer.Option(help="Token ids are drawn below this.")]
Stall = Annotated[
    float,
    typer.Option(
        help="Seconds of silence, or of nothing but refusals (503, 429, errors), after which "
        "the engine counts as gone."
    ),
]
Wait = Annotated[
    float,
    typer.Option(help="Wait so many seconds at most for engines that are still starting."),
]
