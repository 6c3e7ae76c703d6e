"""Commands in README and docs exist as written: groups, options, names of what is shipped."""

import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from biscale_env.cli import build
from biscale_env.config import list_names
from biscale_env.models.coefficient_files import known_names

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHIPPED = {"--gpu": "gpus", "--gpu-spec": "gpus", "--scenario": "scenarios"}
# Names that docs/from-outside.md installs first.
OUTSIDE = tomllib.loads((ROOT / "tests/outside_package/pyproject.toml").read_text())["project"][
    "entry-points"
]
SUDO = 'sudo "$(command -v biscale)"'  # sudo does not search a virtual environment
COMMANDS = typer.main.get_command(build())


def commands_of(text: str) -> list[list[str]]:
    """Words of every ``biscale`` command in the code blocks; brackets of optional parts dropped."""
    found = []
    for block in FENCE.findall(text):
        joined = re.sub(r"\\\n\s*|\n\s+(?=\[)", " ", block)
        for line in joined.splitlines():
            line = line.replace(SUDO, "biscale")
            if line.startswith("biscale "):
                words = shlex.split(line, comments=True)[1:]
                found.append([stripped for w in words if (stripped := w.strip("[]"))])
    return found


def faults(words: list[str]) -> list[str]:
    """What in a command does not exist."""
    command, rest = COMMANDS, list(words)
    while hasattr(command, "commands"):
        name = rest.pop(0)
        if name not in command.commands:
            return [f"no command {name}"]
        command = command.commands[name]
        if "|" in rest:  # alternatives: look at each of their names below
            break
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    if hasattr(command, "commands"):
        asked = [rest[0], *(b for a, b in pairwise(rest) if a == "|")]
        options |= {o for c in command.commands.values() for p in c.params for o in p.opts}
        wrong = [f"no command {name}" for name in asked if name not in command.commands]
    else:
        wrong = []
    given = [word.split("=")[0] for word in rest if word.startswith("--")]
    wrong += [f"no option {option}" for option in given if option not in options]
    for option, value in pairwise(rest):
        if (kind := SHIPPED.get(option)) and not re.search(r"[A-Z./]|^\d", value):
            known = [*list_names(kind), *OUTSIDE.get(f"biscale.{kind}", ())]
            wrong += [f"none of {kind}: {name}" for name in value.split(",") if name not in known]
    shipped = known_names()
    prefixes = {name.split("/")[0] + "/" for name in shipped}
    wrong += [f"no model {w}" for w in rest if w.startswith(tuple(prefixes)) and w not in shipped]
    return wrong


def test_faults_are_found():
    assert faults(["compare", "--gpu", "h100-sxm", "--resume"]) == []
    assert faults(["traces", "list", "|", "fetch", "NAME"]) == []
    assert faults(["comprae"]) == ["no command comprae"]
    assert faults(["traces", "list", "|", "steal", "NAME"]) == ["no command steal"]
    assert faults(["compare", "--recume"]) == ["no option --recume"]
    assert faults(["compare", "--gpu", "h100"]) == ["none of gpus: h100"]
    assert faults(["models", "describe", "h100-sxm/llama70b"]) == ["no model h100-sxm/llama70b"]
    block = ["```", "biscale compare [--trace FILE]", "     [--quick]   # why"]
    text = "\n".join([*block, f"{SUDO} hw \\", "  x", "```", ""])
    assert commands_of(text) == [["compare", "--trace", "FILE", "--quick"], ["hw", "x"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_exist(page):
    assert {" ".join(c): f for c in commands_of(page.read_text()) if (f := faults(c))} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sudo_finds_the_command(page):
    assert "sudo biscale" not in page.read_text(), f"write {SUDO}"


def test_there_are_commands():
    assert sum(len(commands_of(page.read_text())) for page in PAGES) > 40
