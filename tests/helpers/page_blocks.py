"""Blocks of code of a page of the documentation, and how the tests run them.

A comment right before a block changes that: ``<!-- not run: WHY -->``, or ``<!-- run with: OLD =>
NEW; OLD => NEW -->``, which puts a short run in the place of a long one. A YAML or Python block
whose first line is ``# NAME.yaml`` or ``# NAME.py`` is a file.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(
    r"(?:^<!-- (?P<how>not run|run with): (?P<what>.*?) -->\n)?"
    r"^```(?P<language>[a-z]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
FILE = re.compile(r"# ([\w./-]+\.(?:ya?ml|py|csv|toml))\n")
SHOWN = ("text", "toml")
"""Languages of blocks that nobody runs."""


@dataclass(frozen=True)
class PageBlock:
    """A block.

    Attributes:
        language: of its fence; empty for commands.
        code: what is to be run, with what ``run with`` changes.
        file: name of the file that it is; empty for none.
        not_run: why it is not run; empty if it is.
        unused: replacements of ``run with`` that found nothing.
    """

    language: str
    code: str
    file: str = ""
    not_run: str = ""
    unused: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        """Whether the tests run it."""
        return not self.not_run and not self.file and self.language not in SHOWN

    @property
    def is_make(self) -> bool:
        """Whether it holds targets of the Makefile only, which ``.ci/run`` runs."""
        lines = [line for line in self.code.splitlines() if line and not line.startswith("#")]
        return all(line.startswith("make ") for line in lines)


def page_blocks(text: str) -> list[PageBlock]:
    """Every block of a page, in order."""
    found = []
    for match in FENCE.finditer(text):
        code, unused = match["code"], []
        if match["how"] == "run with":
            for pair in match["what"].split("; "):
                old, _, new = pair.partition("=>")
                if old.strip() not in code:
                    unused.append(old.strip())
                code = code.replace(old.strip(), new.strip())
        named = FILE.match(code) if match["language"] in ("yaml", "python") else None
        found.append(
            PageBlock(
                match["language"],
                code,
                named[1] if named else "",
                match["what"] if match["how"] == "not run" else "",
                tuple(unused),
            )
        )
    return found


def shim(folder: Path) -> dict[str, str]:
    """Environment in which ``biscale`` and ``python`` are those of this checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, call in (("biscale", "-m biscale_env.cli"), ("python", "")):
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
        file.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
