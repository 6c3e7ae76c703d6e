"""Options that say what the instance is, the same in every command."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from biscale_env.cli.added_options import with_options

InstanceFile = Annotated[
    Path | None,
    typer.Option(
        "--instance", help="YAML file of an instance (gpu, llm, model, tp, ...); options override."
    ),
]
GpuName = Annotated[
    str | None,
    typer.Option("--gpu", help="GPU, name or YAML file; default: h100-sxm."),
]
LlmName = Annotated[
    str | None,
    typer.Option("--llm", help="LLM, name or YAML file; default: llama-3.3-70b."),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Fitted model: name, folder of coefficient files, or one; default: that of --gpu "
        "and --llm.",
    ),
]
SloName = Annotated[
    str | None,
    typer.Option(
        "--slo",
        help="biscale, mlperf-interactive, mlperf-server, distserve, or a YAML file; "
        "default: biscale.",
    ),
]
TpDegree = Annotated[int | None, typer.Option("--tp", help="GPUs per instance; default: 4.")]
EpDegree = Annotated[
    int | None, typer.Option("--ep", help="Groups that experts are spread over; default: 1.")
]
DtypeName = Annotated[
    str | None,
    typer.Option("--dtype", help="bf16, fp8 or mxfp4; default: as the LLM is published."),
]
IdlePower = Annotated[
    str | None,
    typer.Option(
        "--idle",
        help="What an instance without work draws: last-clock (idle power at the clock it has) or "
        "parked (one power whatever the clock, then a ramp); default: last-clock.",
    ),
]
PrefixCacheName = Annotated[
    str | None,
    typer.Option(
        "--prefix-cache",
        help="Prefix cache of a prefill instance: off, lru (its KV room), lru:TOKENS or infinite; "
        "default: lru for traces with block hashes, off for others.",
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


INSTANCE: Final = "instance"  # the parameter of a command that the options are handed over in
_KINDS: Final[dict[str, Any]] = {
    "slo": SloName,
    "gpu": GpuName,
    "llm": LlmName,
    "model": ModelName,
    "tp": TpDegree,
    "ep": EpDegree,
    "dtype": DtypeName,
    "idle": IdlePower,
    "prefix_cache": PrefixCacheName,
}


def describes_instance(
    *names: str, with_file: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that describe an instance.

    The command has a parameter ``instance``, which the user does not see: it receives the keys of
    :class:`~biscale_env.config.InstanceSpec` that were given, see :func:`instance_changes`.

    Args:
        names: options: keys of ``_KINDS`` above.
        with_file: whether ``--instance FILE`` is an option, too.
    """
    options: dict[str, Any] = {name: (_KINDS[name], None) for name in names}
    if with_file:
        options[INSTANCE] = (InstanceFile, None)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def call(mine: dict[str, Any], given: dict[str, Any]) -> None:
            file = mine.pop(INSTANCE, None)
            command(**given, **{INSTANCE: instance_changes(file, **mine)})

        return with_options(command, INSTANCE, options, call)

    return decorate
