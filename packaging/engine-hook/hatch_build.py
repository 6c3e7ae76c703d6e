"""Puts the hook's files into the distribution as the package ``biscale_hook``."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "biscale_hook"


class CopyHook(BuildHookInterface):
    """Takes the files from the checkout, or from beside this file in an unpacked sdist."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Name the folder to include; hatchling calls this before it builds."""
        here = Path(self.root)
        unpacked = here / PACKAGE
        checkout = here.parents[1] / "biscale_env" / "hardware" / "engines" / "hook"
        source = unpacked if unpacked.is_dir() else checkout
        if not source.is_dir():
            raise FileNotFoundError(f"no hook at {checkout}: build from a checkout or an sdist")
        build_data["force_include"][str(source)] = PACKAGE
