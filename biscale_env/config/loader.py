"""Reading YAML into pydantic models, with errors that name the file, the key and the nearest known
key.
"""

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from biscale_env.core.errors import BiscaleError

M = TypeVar("M", bound=BaseModel)


class Config(BaseModel):
    """Base of all configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "top level"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            str(first["loc"][-1]), list(model.model_fields), n=1, cutoff=0.0
        )
        return (
            f"unknown key '{where}'; the nearest known key is '{near[0]}'"
            if near
            else f"unknown key '{where}'"
        )
    return f"'{where}' = {first.get('input')!r}: {first['msg'].lower()}"


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


def read_yaml(path: Path) -> Any:
    """Parse one YAML file safely.

    Raises:
        BiscaleError: the file is missing, unreadable or not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BiscaleError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise BiscaleError(f"{path} is not valid YAML{line}") from None


def load_yaml(path: Path, model: type[M]) -> M:
    """Read a YAML file into ``model``."""
    return validate(read_yaml(Path(path)), model, str(path))


def load_named(kind: str, name: str, model: type[M]) -> M:
    """Load shipped configuration ``configs/<kind>/<name>.yaml``, or a file if ``name`` is a path to
    one.

    Raises:
        BiscaleError: no such name; the message lists the known ones.
    """
    path = configs_dir() / kind / f"{name}.yaml"
    if not path.is_file():
        as_file = Path(name)
        if as_file.suffix in {".yaml", ".yml"} and as_file.is_file():
            return load_yaml(as_file, model)
        raise BiscaleError(
            f"unknown {kind.rstrip('s')} '{name}'; known: {', '.join(list_names(kind))}"
        )
    return load_yaml(path, model)
