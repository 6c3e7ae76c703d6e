"""What the hardware commands share."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Final, Literal

import typer

from biscale_env.cli.added_options import with_options
from biscale_env.cli.instance_options import GpuName, LlmName

if TYPE_CHECKING:
    from biscale_env.config import InstanceSpec

SOCKETS = Path("/tmp/biscale")
Backend = Annotated[str, typer.Option(help="nvml, zeusd[:SOCKET] or fake:STATE_FILE.")]
Sockets = Annotated[
    Path, typer.Option(help="Folder of the sockets between hook, controller and actuator.")
]
GpuSets = Annotated[
    list[str],
    typer.Option("--gpus", help="GPUs of one instance, e.g. prefill=0,1,2,3; repeatable."),
]
GpuSpec = Annotated[
    str | None,
    typer.Option(
        "--gpu-spec",
        help="GPU description (name or YAML file) that bounds the clocks; default the device's own "
        "range.",
    ),
]
Instance = Annotated[
    Path | None,
    typer.Option(help="YAML description of the instance; options given beside it change it."),
]
Tp = Annotated[int | None, typer.Option(help="GPUs per instance; default 4.")]
Dtype = Annotated[
    str | None, typer.Option(help="bf16, fp8 or mxfp4; default as the LLM is published.")
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Fitted model: name, folder of coefficient files, or one; default that of GPU and LLM."
    ),
]
TokenBudget = Annotated[
    int | None, typer.Option(help="New tokens per prefill batch; default 2048.")
]
MaxSeqs = Annotated[int | None, typer.Option(help="Requests per batch; default 256.")]
LookAhead = Annotated[
    bool,
    typer.Option(
        help="Where the engine schedules asynchronously, decide for the begin of the iteration "
        "that a record is about; --no-look-ahead: as if that were now."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(help="Key of the engines.", envvar="OPENAI_API_KEY", show_envvar=True),
]
Slo = Annotated[str | None, typer.Option(help="SLO; default biscale.")]
Delay = Annotated[
    float | None, typer.Option(help="Expected actuation delay, s; default the model's.")
]
Lease = Annotated[
    float, typer.Option(help="Seconds without a living controller until clocks are reset.")
]
Phase = Annotated[str, typer.Option(help="prefill or decode.")]
Keys = Annotated[
    Path | None,
    typer.Option(
        help="Folder of this machine's keys (`biscale hw keys`); without it no address beyond "
        "loopback."
    ),
]
Means = Annotated[
    Literal["lock", "cap"],
    typer.Option(
        help="How a clock is held: lock it, or cap the power where clocks may not be locked."
    ),
]
_ENGINE_KINDS: Final[dict[str, Any]] = {
    "gpu": GpuName,
    "llm": LlmName,
    "model": Model,
    "tp": Tp,
    "dtype": Dtype,
    "token_budget": TokenBudget,
    "max_seqs": MaxSeqs,
}
EXTRA = {
    "zmq": "pyzmq",
    "msgspec": "msgspec",
    "aiohttp": "aiohttp",
    "httpx_sse": "httpx-sse",
    "httpx": "httpx",
    "pynvml": "nvidia-ml-py",
}


def need_extra() -> None:
    """Refuse plainly where the packages of the extra are missing.

    Raises:
        BiscaleError: names the first one that is not installed.
    """
    from biscale_env.core.extras import need_packages

    need_packages("the hardware commands need", "hw", EXTRA)


def need_hardware() -> None:
    """Refuse plainly where clocks and engines cannot be controlled.

    Raises:
        BiscaleError: not on Linux (which frees sockets and locks of dead processes, ends children
            with their parents and schedules in real time), or a package is missing.
    """
    from biscale_env.core.platforms import need_linux

    need_linux("the hardware commands")
    need_extra()


def open_log(path: Path | None) -> BinaryIO | None:
    """Open a log for appending; None for none. Under sudo it is opened as the caller.

    Raises:
        BiscaleError: it cannot be written.
    """
    from biscale_env.core.errors import BiscaleError
    from biscale_env.hardware.clocks.caller import as_caller

    try:
        with as_caller():
            return path.open("ab") if path else None
    except OSError as error:
        raise BiscaleError(f"cannot write {path}: {error.strerror}") from None


@contextlib.contextmanager
def log_to(path: Path | None) -> Iterator[BinaryIO | None]:
    """A log for appending, closed at the end; None for none.

    Raises:
        BiscaleError: it cannot be opened.
    """
    stream = open_log(path)
    try:
        yield stream
    finally:
        if stream:
            with contextlib.suppress(OSError):  # who writes reports what cannot be written
                stream.close()


def instance_of(file: Path | None, **changes: object) -> "InstanceSpec":
    """Description of an instance from a file, with single values changed.

    Args:
        file: YAML file; None: the defaults of :class:`~biscale_env.config.InstanceSpec`, with the
            batch limit of vLLM.
        changes: values of the command line; None leaves the file's.

    Raises:
        BiscaleError: the file cannot be read, or a value makes no sense.
    """
    from biscale_env.config import InstanceSpec
    from biscale_env.hardware.engines.engine_instance import ENGINE_INSTANCE

    spec = InstanceSpec.from_yaml(file) if file else ENGINE_INSTANCE
    return spec.changed(**{key: value for key, value in changes.items() if value is not None})


def describes_engine(
    *names: str,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that describe an engine's instance.

    The command has a parameter ``instance``, which the user does not see: it receives what
    :func:`instance_of` makes of them.

    Args:
        names: options beside the file: keys of ``_ENGINE_KINDS``.
    """
    options = {"instance": (Instance, None)} | {n: (_ENGINE_KINDS[n], None) for n in names}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def call(mine: dict[str, Any], given: dict[str, Any]) -> None:
            file = mine.pop("instance")
            command(**given, instance=instance_of(file, **mine))

        return with_options(command, "instance", options, call)

    return decorate


def clock_bounds(
    gpu_spec: str | None, instance: Path | None = None
) -> tuple[float | None, float | None]:
    """Lowest and highest clock that may be set, MHz.

    Args:
        gpu_spec: name or file of a GPU description.
        instance: YAML description of an instance, whose GPU counts where ``gpu_spec`` is None.

    Returns:
        The bounds; None for both where the device alone bounds its clocks.

    Raises:
        BiscaleError: an unknown description.
    """
    from biscale_env.config import InstanceSpec, load_gpu
    from biscale_env.models import instance_model

    if gpu_spec is not None:
        gpu = load_gpu(gpu_spec)
    elif instance is not None:
        gpu = instance_model("prefill", InstanceSpec.from_yaml(instance)).gpu
    else:
        return None, None
    return gpu.freq_min_mhz, gpu.freq_max_mhz


def parse_groups(items: list[str]) -> dict[str, tuple[str, ...]]:
    """Groups of ``NAME=GPU,GPU,...``; ``4-7`` stands for 4,5,6,7.

    Raises:
        BiscaleError: an item of another form, or a name twice.
    """
    from biscale_env.core.errors import BiscaleError

    groups: dict[str, tuple[str, ...]] = {}
    for item in items:
        name, equals, rest = item.partition("=")
        if not (name.isidentifier() and equals and rest) or name in groups:
            raise BiscaleError(
                f"--gpus '{item}': write NAME=GPU,GPU,... with each name once, "
                "e.g. --gpus prefill=0,1,2,3"
            )
        keys: list[str] = []
        for part in rest.split(","):
            first, dash, last = part.partition("-")
            if dash and first.isdigit() and last.isdigit():
                keys += [str(k) for k in range(int(first), int(last) + 1)]
            else:
                keys.append(part.strip())
        groups[name] = tuple(keys)
    return groups
