"""What a page of the documentation tells to type is run, in an empty folder, from top to bottom."""

import re
import subprocess
from pathlib import Path

import pytest
from page_blocks import page_blocks, shim

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
}
ELSEWHERE = {
    "docs/agents.md": "hours of training; docs/train.md runs its commands, tests/agents the rest",
    "docs/deployment.md": "tests/hardware/deploy",
    "docs/environments.md": "tests/project/test_environment_pages.py",
    "docs/hardware.md": "needs GPUs; without them: tests/hardware and simulation-to-hardware.md",
    "docs/simulation-to-hardware.md": "tests/hardware/test_hardware_docs.py",
}
RUN = {
    name
    for name, text in PAGES.items()
    if name not in ELSEWHERE
    and any(block.runs and not block.is_make for block in page_blocks(text))
}
NEEDS = {
    "docs/build.md": "aiconfigurator_core",
    "docs/train.md": "stable_baselines3",
    "docs/environments/many-agents.md": "pettingzoo",
}


def test_blocks_are_read_as_the_pages_mean_them():
    text = (
        "a\n```\nbiscale x  # why\n```\n<!-- not run: hours -->\n```\nbiscale y\n```\n"
        "<!-- run with: --steps 9 => --steps 1; z =>  -->\n```\nbiscale t --steps 9 z\n```\n"
        "```yaml\n# a/b.yaml\nk: 1\n```\n```python\n# mine.py\nx = 1\n```\n"
        "```python\nprint(1)\n```\n"
        "```text\nf = 1\n```\n```\nmake lint\n```\n<!-- run with: q => r -->\n```\nbiscale s\n```\n"
    )
    blocks = page_blocks(text)
    assert [b.runs for b in blocks] == [True, False, True, False, False, True, False, True, True]
    assert blocks[1].not_run == "hours"
    assert blocks[2].code == "biscale t --steps 1 \n"
    assert [b.file for b in blocks[3:5]] == ["a/b.yaml", "mine.py"]
    assert [b.is_make for b in blocks[-2:]] == [True, False]
    assert blocks[-1].unused == ("q",)


def test_there_are_pages_that_run():
    assert len(RUN) >= 8, RUN
    assert set(ELSEWHERE) <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_every_block_says_how_it_is_run(name):
    blocks = page_blocks(PAGES[name])
    assert len(blocks) == len(re.findall(r"^```[a-z]*$", PAGES[name], re.MULTILINE)) / 2
    assert [u for b in blocks for u in b.unused] == [], "a replacement that replaces nothing"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in blocks:
        if block.runs and block.is_make:
            for line in block.code.splitlines():
                words = re.sub(r"#.*", "", line).split()[1:]
                assert {w for w in words if "=" not in w} <= targets, line


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RUN))
def test_a_page_runs_as_printed(name, tmp_path, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    binaries, folder = tmp_path / "bin", tmp_path / "here"
    folder.mkdir()
    env = shim(binaries)
    (folder / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    blocks = [block for block in page_blocks(PAGES[name]) if not block.not_run]
    for block in blocks:
        if block.file and not (folder / block.file).exists():
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.code)
    space: dict[str, object] = {}
    for block in blocks:
        if not block.runs or block.is_make:
            continue
        if block.language == "python":
            exec(compile(block.code, name, "exec"), space)
            continue
        done = subprocess.run(
            ["bash", "-ec", block.code],
            env=env,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"
