"""Every `biscale` command line in the hardware guide exists, with every option it uses."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from biscale_env.cli import build

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ["hardware.md", "hardware-readme.md"]


def commands():
    """Command lines in code, continuation lines joined."""
    for page in PAGES:
        text = (DOCS / page).read_text()
        code = re.findall(r"```\n(.*?)```", text, flags=re.S) + re.findall(r"`([^`\n]+)`", text)
        for block in code:
            for line in block.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("sudo ").removesuffix("&").strip()
                if line.startswith("biscale "):
                    yield pytest.param(line, id=line[:60])


@pytest.mark.parametrize("line", list(commands()))
def test_the_command_and_its_options_exist(line):
    words = shlex.split(line)[1:]
    command = typer.main.get_command(build())
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands"), f"'{line}' names no command"
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert used <= known, f"{sorted(used - known)} are not options of '{line}'"


def test_the_guide_names_commands():
    assert len(list(commands())) > 15


def test_every_environment_variable_of_the_guide_is_read_somewhere():
    sources = "".join(p.read_text() for p in (DOCS.parent / "biscale_env").rglob("*.py"))
    for page in PAGES:
        for name in set(re.findall(r"\b(?:BISCALE|ZEUSD)_[A-Z_]+\b", (DOCS / page).read_text())):
            assert f'"{name}"' in sources, name


def test_links_point_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", (DOCS / page).read_text()):
            assert (DOCS / target).exists() or (DOCS.parent / target).exists(), target


def test_test_files_that_the_guide_names_exist():
    for name in re.findall(r"`(tests/[\w./]+)`", (DOCS / "hardware.md").read_text()):
        assert (DOCS.parent / name).exists(), name
