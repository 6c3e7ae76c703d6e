"""The config of a run directory: written once, and the same whenever the run goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from biscale_env.config.loader import read_yaml
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole

RUN_CONFIG: Final = "config.yaml"


def new_folder(wanted: Path) -> Path:
    """Make a directory of this name, or of the name with -2, -3, ... if it is there already."""
    number, folder = 1, wanted
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        else:
            return folder


def open_config(
    folder: Path, plain: Mapping[str, Any], resume: bool, what: str = "training run"
) -> None:
    """Write the config of a new run, or check that of one that goes on.

    Args:
        folder: directory of the run, which exists.
        plain: the config as plain values.
        resume: go on with a run that is there.
        what: the kind of run, for messages.

    Raises:
        BiscaleError: there is a run and resume was not asked for, none to resume, or its config
            was another.
    """
    known, article = folder / RUN_CONFIG, "an" if what[0] in "aeiou" else "a"
    if resume and not known.is_file():
        raise BiscaleError(f"{folder} holds no {what} to resume")
    if known.is_file() and not resume:
        raise BiscaleError(
            f"{folder} holds {article} {what} already: add --resume or choose another --out"
        )
    if resume:
        old = read_yaml(known)
        if not isinstance(old, dict):
            raise BiscaleError(f"{known} is empty or damaged: restore it or choose another --out")
        changed = sorted(k for k in old.keys() | plain.keys() if old.get(k) != plain.get(k))
        if changed:
            raise BiscaleError(
                f"cannot resume {folder}: '{changed[0]}' was {old.get(changed[0])} and is now "
                f"{plain.get(changed[0])}; use the same config"
            )
    write_whole(known, yaml.safe_dump(dict(plain), sort_keys=False))
