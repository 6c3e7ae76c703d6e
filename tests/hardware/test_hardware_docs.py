"""Every `biscale` command line of the hardware guides exists.

The example without a GPU runs as printed.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
from hardware_helpers import free_port
from page_blocks import shim

from biscale_env.cli import build

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def pages():
    """The guides."""
    names = ("hardware.md", "simulation-to-hardware.md", "deployment.md")
    return [(DOCS, (DOCS / name).read_text()) for name in names]


def commands():
    """Command lines in code, continuation lines joined."""
    for _, text in pages():
        code = re.findall(r"```\n(.*?)```", text, flags=re.S) + re.findall(r"`([^`\n]+)`", text)
        for block in code:
            for line in block.replace("\\\n", " ").splitlines():
                line = line.replace('sudo "$(command -v biscale)"', "biscale")
                line = line.strip().removesuffix("|| true")
                line = line.strip().removesuffix("&").strip()
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
    sources = "".join(p.read_text() for p in (ROOT / "biscale_env").rglob("*.py"))
    units = "".join(p.read_text() for p in (ROOT / "packaging" / "systemd").glob("*.service"))
    for _, text in pages():
        for name in set(re.findall(r"\b(?:BISCALE|ZEUSD)_[A-Z_]+\b", text)):
            assert f'"{name}"' in sources or f"${{{name}}}" in units, name


def test_links_point_to_files():
    for folder, text in pages():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (folder / target).exists(), target


def test_test_files_that_the_guide_names_exist():
    for name in re.findall(r"`(tests/[\w./]+)`", pages()[0][1]):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_the_example_without_a_gpu_runs_as_printed(tmp_path):
    """In an empty folder and offline.

    Only ports, folders and the length are others, so that tests can run side by side.
    """
    (block,) = re.findall(r"```\n(.*?)```", pages()[1][1], flags=re.S)
    first = free_port(2)
    ports = first, first + 1
    emulate = (
        f"hw emulate --state s/gpus --sockets s --prefill-port {ports[0]} --decode-port {ports[1]}"
    )
    for printed, here in (
        ("hw emulate", emulate),
        (":8100", f":{ports[0]}"),
        (":8200", f":{ports[1]}"),
        ("/tmp/biscale/gpus", "s/gpus --sockets s"),
        ("--duration 60", "--duration 12"),
    ):
        assert printed in block
        block = block.replace(printed, here)
    empty = tmp_path / "e"
    empty.mkdir()
    env = shim(tmp_path / "bin") | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "BISCALE_HW_STATE": str(tmp_path / "owned"),
    }
    script = f"set -em\n{block}\nwait || true\n"
    done = subprocess.run(
        ["bash", "-c", script], cwd=empty, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "simulation against runs/emulated" in done.stdout
    assert (empty / "runs" / "emulated" / "report.html").is_file()
