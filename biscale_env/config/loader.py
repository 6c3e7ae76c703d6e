"""Reading YAML into pydantic models.

Errors name the file, the key and the nearest known key.
"""

import difflib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from biscale_env.config.installed_files import installed_names, installed_path
from biscale_env.core.errors import BiscaleError

M = TypeVar("M", bound=BaseModel)


class Config(BaseModel):
    """Base of all configuration: frozen, and an unknown key is an error.

    Attributes:
        FLAT: fields that are configurations themselves and whose keys may also stand one level up,
            beside the other keys of this one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    FLAT: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def known_keys(cls) -> list[str]:
        """Keys that may be given, those of the ``FLAT`` fields included."""
        inner = [cls.model_fields[name].annotation for name in cls.FLAT]
        nested = [key for kind in inner if kind is not None for key in kind.model_fields]
        return [*cls.model_fields, *nested]


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like ``name``; empty if none is known."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)), "")


def configs_dir() -> Path:
    """Folder of the shipped configuration.

    Inside the installed wheel, else beside the package in a checkout.

    Raises:
        BiscaleError: the installation has lost its configuration files.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise BiscaleError(f"the configuration files are missing from {package}: reinstall biscale-env")


def list_names(kind: str) -> list[str]:
    """Names of the shipped configurations of one kind, e.g. ``gpus``."""
    return sorted(p.stem for p in (configs_dir() / kind).glob("*.yaml"))


LONGEST_VALUE: Final = 200  # characters of a wrong value that a message repeats


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    config = model if issubclass(model, Config) else None
    hidden = config.FLAT if config else ()
    where = ".".join(str(part) for part in first["loc"] if part not in hidden) or "top level"
    if first["type"] == "extra_forbidden":
        known = config.known_keys() if config else list(model.model_fields)
        near = nearest(str(first["loc"][-1]), known)
        tail = f"; the nearest known key is '{near}'" if near else ""
        return f"unknown key '{where}'{tail}"
    given = repr(first.get("input"))
    told = f"'{where}' = {given}" if len(given) <= LONGEST_VALUE else f"'{where}'"
    return f"{told}: {first['msg'].lower()}"


def validate(data: Any, model: type[M], where: str) -> M:
    """Validate plain data into ``model``; ``where`` names the origin in the error.

    Raises:
        BiscaleError: not a mapping, an unknown key, or a value out of range.
    """
    if not isinstance(data, dict):
        raise BiscaleError(
            f"{where}: expected a mapping of keys to values, got {type(data).__name__}"
        )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise BiscaleError(f"{where}: {_explain(error, model)}") from None


def read_bytes(path: Path) -> bytes:
    """Content of a file.

    Raises:
        BiscaleError: the file is missing or unreadable.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BiscaleError(f"cannot read {path}: {error.strerror}") from None


def parse_yaml(content: bytes, where: str) -> Any:
    """Parse YAML safely; ``where`` names the file in the error.

    Raises:
        BiscaleError: not UTF-8 text, or not YAML.
    """
    try:
        return yaml.load(
            content.decode("utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
    except UnicodeDecodeError:
        raise BiscaleError(f"cannot read {where}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise BiscaleError(f"{where} is not valid YAML{line}") from None


def read_yaml(path: Path) -> Any:
    """Parse one YAML file safely.

    Raises:
        BiscaleError: the file is missing, unreadable or not YAML.
    """
    return parse_yaml(read_bytes(path), str(path))


@lru_cache(maxsize=256)
def _validated(content: bytes, model: type[M], where: str) -> M:
    return validate(parse_yaml(content, where), model, where)


def load_shared(path: Path, model: type[M]) -> M:
    """Read a YAML file into ``model``: one object per content, which the caller must not change.

    The file is read at every call and parsed once per content, so that a changed file is never
    taken for the old one.
    """
    return _validated(read_bytes(path), model, str(path))


def load_yaml(path: Path, model: type[M]) -> M:
    """Read a YAML file into ``model``; parsed once per content, a fresh copy for every caller."""
    return load_shared(Path(path), model).model_copy(deep=True)


def find_named(kind: str, name: str, beside: Path | None = None) -> Path:
    """Path of shipped configuration ``configs/<kind>/<name>.yaml``, or of a YAML file.

    Shipped names come before paths, and those before names of installed packages.

    Args:
        kind: folder below ``configs``, e.g. ``gpus``.
        name: shipped name, path of a ``.yaml`` file, or a name that an installed package brings.
        beside: folder in which a file is looked for first.

    Raises:
        BiscaleError: no such name; the message lists the known ones and the nearest.
    """
    path = configs_dir() / kind / f"{name}.yaml"
    if path.is_file():
        return path
    if Path(name).suffix in {".yaml", ".yml"}:
        for file in ([beside / name] if beside else []) + [Path(name)]:
            if file.is_file():
                return file
    outside = installed_path(kind, name)
    if outside is not None:
        return outside
    known = [*list_names(kind), *installed_names(kind)]
    raise BiscaleError(
        f"unknown {kind.rstrip('s')} '{name}'; known: {', '.join(known)}, or the path of a YAML "
        f"file; the nearest name is '{nearest(name, known)}'"
    )


def load_named(kind: str, name: str, model: type[M], beside: Path | None = None) -> M:
    """Load shipped configuration ``configs/<kind>/<name>.yaml``, or a YAML file.

    Raises:
        BiscaleError: no such name (see :func:`find_named`), or bad content.
    """
    return load_yaml(find_named(kind, name, beside), model)
