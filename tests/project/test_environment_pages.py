"""The guide's examples run, and the pages of the environments are those of today's code."""

import re
import sys
from pathlib import Path

import gymnasium as gym
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
GUIDE = (DOCS / "environments.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.mark.slow
def test_every_example_of_the_guide_runs() -> None:
    pytest.importorskip("stable_baselines3")  # the recipe of the agents
    space: dict[str, object] = {"gym": gym}
    for example in EXAMPLES:
        exec(compile(example, "docs/environments.md", "exec"), space)
        env = space["env"]
        env.reset(seed=0)  # type: ignore[attr-defined]
        env.step(env.action_space.sample())  # type: ignore[attr-defined]
    assert len(EXAMPLES) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefill.md", "decode.md", "cluster.md", "many-agents.md"])
def test_pages_are_those_of_the_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made again they are the same, up to numbers that the fitted models give."""
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    import environment_pages

    whole = {
        "cluster.md": environment_pages.cluster_page,
        "many-agents.md": environment_pages.agents_page,
    }
    if name in whole:
        text = whole[name]()
    else:
        text = environment_pages.phase_page(name.removesuffix(".md"))
    number = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")
    committed = (DOCS / "environments" / name).read_text()
    assert number.sub("#", text) == number.sub("#", committed), "python docs/update.py envs"
