"""The guide's two emulated machines, from keys to `validate`, as printed."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
from page_blocks import shim

ROOT = Path(__file__).resolve().parents[3]
GUIDE = ROOT / "docs" / "deployment.md"
NAME = "emulated-two-machines"
# a command that fails leaves nothing behind
END = "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n"


def blocks():
    """Code of the section that is to be followed."""
    section = re.search(r"^## Two emulated machines.*?^## ", GUIDE.read_text(), flags=re.S | re.M)
    return re.findall(r"```\n(.*?)```", section[0], flags=re.S)


def own_deployment(folder):
    """The example on other loopback addresses and in a folder of this test."""
    text = (ROOT / "configs" / "deployments" / f"{NAME}.yaml").read_text()
    text = text.replace("127.0.0.1", "127.7.12.1").replace("127.0.0.2", "127.7.12.2")
    path = folder / "two.yaml"
    path.write_text(text.replace("/tmp/biscale/two", str(folder / "two")))
    return path


def test_the_guide_goes_from_keys_to_validate():
    first, second = blocks()
    assert [line.split()[2] for line in first.splitlines()[:2]] == ["keys", "emulate"]
    assert "biscale validate runs/two-machines" in second.splitlines()


@pytest.fixture
def short():
    """A folder with a short name: paths of sockets are bounded."""
    with tempfile.TemporaryDirectory(prefix="bg-") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_the_guide_runs_as_printed(short):
    """In an empty folder and offline; only addresses, folders and the length are others."""
    script = "".join(blocks())
    assert script.count("--duration 60") == 1
    script = script.replace("--duration 60", "--duration 20")
    script = script.replace(NAME, str(own_deployment(short)))
    empty = short / "e"
    empty.mkdir()
    env = shim(short / "bin") | {"BISCALE_HW_STATE": str(short / "owned"), "COLUMNS": "160"}
    done = subprocess.run(
        ["bash", "-c", f"{END}set -em\n{script}\nwait || true\n"],
        cwd=empty,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "nothing was sent" in said  # the replay that came too early
    assert "cluster prefill" in said  # validate compares the whole too
    assert (empty / "runs" / "two-machines" / "report.html").is_file()
    assert not list((short / "owned").glob("*.json"))  # no clock is left locked
