"""Options that say what the instance is, the same in every command."""

from pathlib import Path
from typing import Annotated, Any

import typer

InstanceFile = Annotated[
    Path | None,
    typer.Option(
        "--instance", help="YAML file of an instance (gpu, llm, model, tp, ...); options override."
    ),
]
GpuName = Annotated[
    str | None,
    typer.Option("--gpu", help="GPU, name or YAML file. [default: h100-sxm]"),
]
LlmName = Annotated[
    str | None,
    typer.Option("--llm", help="LLM, name or YAML file. [default: llama-3.3-70b]"),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Fitted model: name, folder of coefficient files, or one. [default: that of --gpu "
        "and --llm]",
    ),
]
SloName = Annotated[
    str | None,
    typer.Option(
        "--slo",
        help="biscale, mlperf-interactive, mlperf-server, distserve, or a YAML file. "
        "[default: biscale]",
    ),
]
TpDegree = Annotated[int | None, typer.Option("--tp", help="GPUs per instance. [default: 4]")]
EpDegree = Annotated[
    int | None, typer.Option("--ep", help="Groups that experts are spread over. [default: 1]")
]
DtypeName = Annotated[
    str | None,
    typer.Option("--dtype", help="bf16, fp8 or mxfp4. [default: as the LLM is published]"),
]
IdlePower = Annotated[
    str | None,
    typer.Option(
        "--idle",
        help="What an instance without work draws: last-clock (idle power at the clock it has) or "
        "parked (one power whatever the clock, then a ramp). [default: last-clock]",
    ),
]


def instance_changes(file: Path | None, **options: Any) -> dict[str, Any]:
    """Keys of an instance that the user gave: those of the file, and options that are not None.

    Raises:
        BiscaleError: the file is not the description of an instance.
    """
    from biscale_env.config import InstanceSpec

    given = InstanceSpec.from_yaml(file).model_dump(exclude_unset=True) if file else {}
    return given | {key: value for key, value in options.items() if value is not None}
