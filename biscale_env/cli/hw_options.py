"""What the hardware commands share."""

from pathlib import Path
from typing import BinaryIO

SOCKETS = Path("/tmp/biscale")
EXTRA = {"zmq": "pyzmq", "msgspec": "msgspec", "aiohttp": "aiohttp", "pynvml": "nvidia-ml-py"}


def need_extra() -> None:
    """Refuse plainly where the packages of the extra are missing.

    Raises:
        BiscaleError: names the first one that is not installed.
    """
    from importlib.util import find_spec

    from biscale_env.core.errors import BiscaleError

    for module, package in EXTRA.items():
        if find_spec(module) is None:
            raise BiscaleError(
                f"the hardware commands need {package}: pip install 'biscale-env[hw]'"
            )


def open_log(path: Path | None) -> BinaryIO | None:
    """Open a log for appending; None for none.

    Raises:
        BiscaleError: it cannot be written.
    """
    from biscale_env.core.errors import BiscaleError

    try:
        return path.open("ab") if path else None
    except OSError as error:
        raise BiscaleError(f"cannot write {path}: {error.strerror}") from None


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
                f"--gpus '{item}': write NAME=GPU,GPU,... with each name once, e.g. --gpus prefill=0,1,2,3"
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
