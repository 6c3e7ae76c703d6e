"""Commands of the command line in this process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Call = Callable[..., tuple[Any, str, str]]


def caller(capsys: Any, monkeypatch: Any, folder: Path, *before: str) -> Call:
    """What runs ``biscale BEFORE... ARGUMENTS...`` in a folder: (exit code, stdout, stderr)."""

    def invoke(*arguments: object) -> tuple[Any, str, str]:
        from biscale_env.cli import main

        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["biscale", *before, *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return invoke
