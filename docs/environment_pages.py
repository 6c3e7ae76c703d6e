"""One page per environment, made from the objects themselves: docs/environments/.

Numbers, keys and defaults are read from an environment that is made and stepped; meanings are the
docstrings of the code.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from biscale_env.config import InstanceSpec, Slo
from biscale_env.envs.cluster.cluster_env import FEATURES, ClusterEnv
from biscale_env.envs.cluster.cluster_kpis import cluster_kpis
from biscale_env.envs.cluster.parallel_env import ClusterParallelEnv
from biscale_env.envs.kpis import kpis_of
from biscale_env.envs.options import RESET_KEYS, WorkloadOptions
from biscale_env.envs.plant import PlantSettings
from biscale_env.envs.registration import CLUSTER_ID, ENV_IDS, INTERVAL_IDS
from biscale_env.envs.single import PhaseEnv
from biscale_env.envs.vector import PhaseVectorEnv
from biscale_env.wrappers.compact_observation import compact_parts
from biscale_env.wrappers.reward_terms import TERMS

HEAD = "Made by `python docs/update.py envs` from the environment itself."


def attributes(of: type, section: str = "Attributes") -> dict[str, str]:
    """Names and meanings in a section of a docstring."""
    text = inspect.getdoc(of) or ""
    match = re.search(rf"^{section}:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    found: dict[str, str] = {}
    name = ""
    for line in match.group(1).splitlines() if match else ():
        entry = re.match(r"    (\w+): (.*)", line)
        if entry:
            name = entry.group(1)
            found[name] = entry.group(2)
        elif name and line.strip():
            found[name] += " " + line.strip()
    return {name: code(text) for name, text in found.items()}


def code(text: str) -> str:
    """Roles and literals of Sphinx as Markdown code; what follows ``**options`` is left out."""
    plain = re.sub(r":\w+:`([^`]+)`", r"`\1`", text.replace("``", "`"))
    return plain.split(" **options:")[0]


def rows(head: tuple[str, ...], lines: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    text = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join(text + [f"| {' | '.join(str(v) for v in line)} |" for line in lines])


def _default(of: Any, name: str) -> str:
    if hasattr(of, "model_fields") and name in of.model_fields:
        value = of.model_fields[name].get_default(call_default_factory=True)
    else:
        value = getattr(of, name, None)
    return f"`{value}`" if value is not None else "–"


def options() -> str:
    """Every option of the environments of one instance."""
    lines = []
    for of in (WorkloadOptions, PlantSettings, InstanceSpec):
        lines += [
            (f"`{name}`", _default(of, name), meaning)
            for name, meaning in attributes(of).items()
            if name != "phase"
        ]
    return rows(("option", "default", "meaning"), lines)


def prose(of: Any) -> str:
    """A docstring as Markdown: roles of Sphinx become code, sections are left out."""
    text = (inspect.getdoc(of) or "").split("\nArgs:")[0].split("\nAttributes:")[0]
    return code(text.split("\nReturns:")[0]).strip()


def returns(of: Any) -> str:
    """What a function's docstring says it returns, as one paragraph."""
    text = (inspect.getdoc(of) or "").split("Returns:\n")[1]
    return re.sub(r"\s+", " ", text).replace("``", "`").strip()


def phase_page(phase: str) -> str:
    """The page of one phase."""
    ids = [i for i, (p, _) in ENV_IDS.items() if p == phase]
    intervals = {i: s for i, (p, s) in INTERVAL_IDS.items() if p == phase}
    env: Any = gym.make(ids[0]).unwrapped
    _, info = env.reset(seed=0)
    plant, spec = env.plant, env.plant.spec
    source = env.options.source
    top = plant.clocks
    levels = ", ".join(f"{f:g}" for f in top.levels_mhz)
    slo_text = "; ".join(f"`{n}`: {m.rstrip('.')}" for n, m in attributes(Slo).items())
    of_phase = "TTFT" if phase == "prefill" else "TPOT"
    every = ", ".join(f"`{i}` (at least {s:g} s apart)" for i, s in intervals.items())
    space = env.action_space
    parts = [
        f"# {phase.capitalize()}: {', '.join(f'`{i}`' for i in ids)}",
        HEAD,
        f"Ids whose decisions are further apart: {every}.",
        prose(PhaseEnv),
        "## Action",
        f"`{space}`: -1 is {top.freq_min_mhz:g} MHz, 1 is {top.freq_max_mhz:g} MHz, linear between "
        f"and snapped to a grid of {top.freq_step_mhz:g} MHz; values outside are clipped, NaN is "
        f"refused. `{ids[1]}`: index of a level, {levels} MHz. Other forms: "
        "[wrappers](../environments.md#actions).",
        "## Reward",
        f"`-energy_j / {plant.energy_ref_j:.3g} J - {plant.settings.violation_weight:g} x requests "
        f"that missed {of_phase}` in the default plant; the reference energy is "
        + (
            "that of a prompt of 1024 tokens at max clock"
            if phase == "prefill"
            else "that of 128 output tokens at batch 32 and context 1024 at max clock"
        )
        + f", `env.unwrapped.plant.energy_ref_j`. {of_phase} is late above "
        f"{plant.slo.bound_s(phase):g} s (SLO `{plant.slo.name}`).",
        "## Episode",
        f"{source.episode_s:g} s of simulated time, then `truncated`; never `terminated`. Default "
        f"load: 0.75 of the capacity at max clock, here {source.rate_rps:.3g} requests/s. An "
        "episode begins with the first request, idle before it, at max clock. "
        f"`reset(options=)` takes {', '.join(f'`{k}`' for k in RESET_KEYS)}. Workload k is the "
        "same for every policy. Autoreset of the native vector form: "
        f"`{PhaseVectorEnv.metadata['autoreset_mode'].name}` unless `autoreset_mode` says "
        "otherwise, which takes all modes of Gymnasium.",
        "## Info",
        rows(
            ("key", "at the first reset of seed 0"),
            [(f"`{k}`", f"{v:.4g}") for k, v in info.items()],
        ),
        f"At the end `kpis`: {returns(kpis_of)}",
        f"## Observation `{spec.id}`",
        spec.markdown(),
        "### Compact: 20 numbers (`CompactObservation`)",
        rows(
            ("name", "meaning"),
            [(f"`{p.name}`", p.meaning.replace("|", "\\|")) for p in compact_parts(phase)],
        ),
        "## Options",
        options(),
        f"An SLO is a name, a YAML file, an object or a mapping with {slo_text}.",
        "Reward terms for `NamedReward`: "
        + "; ".join(f"`{t.name}`: {t.meaning}" for t in TERMS.values())
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def cluster_page() -> str:
    """The page of the coarse loop."""
    env: Any = gym.make(CLUSTER_ID).unwrapped
    _, info = env.reset(seed=0)
    lines = [(i, f"`{n}`", unit, f"{scale:g}") for i, (n, unit, scale) in enumerate(FEATURES)]
    arguments = attributes(ClusterEnv.__init__, "Args")  # type: ignore[arg-type]
    arguments.pop("options", None)
    parts = [
        f"# The coarse loop: `{CLUSTER_ID}`",
        HEAD,
        prose(ClusterEnv),
        "## Action",
        f"`{env.action_space}`: index into `env.unwrapped.placements`, ordered by TP, number of "
        "instances and base clocks.",
        "## Episode",
        f"{env.windows} windows of {env.window_s:g} s at {env.options.source.rate_rps:g} requests "
        "per second.",
        "## Info",
        ", ".join(f"`{key}`" for key in info) + f". At the end `kpis`: {returns(cluster_kpis)}",
        "## Observation",
        "Of the window before, `encoded = clip(value / scale, 0, 100)`.",
        rows(("index", "name", "unit", "scale"), lines),
        "## Options",
        rows(("option", "meaning"), [(f"`{n}`", m) for n, m in arguments.items()]),
        "Others are those of [one instance](prefill.md#options) and of the cluster, see "
        "[cluster.md](../cluster.md#as-environments).",
    ]
    return "\n\n".join(parts) + "\n"


def agents_page() -> str:
    """The page of the many-agents form."""
    env: Any = ClusterParallelEnv()
    _, infos = env.reset(seed=0)
    first = {agent.partition("_")[0]: agent for agent in reversed(env.possible_agents)}
    lines = [
        (
            f"`{phase}_0` to `{phase}_{sum(a.startswith(phase) for a in env.possible_agents) - 1}`",
            f"`{env.action_space(agent)}`",
            f"{env.observation_space(agent).shape[0]} values, as of [{phase}]({phase}.md)",
        )
        for phase, agent in sorted(first.items(), reverse=True)
    ]
    arguments = attributes(ClusterParallelEnv.__init__, "Args")  # type: ignore[arg-type]
    arguments.pop("options", None)
    parts = [
        "# Many agents: `ClusterParallelEnv`",
        HEAD,
        prose(ClusterParallelEnv),
        "A PettingZoo `ParallelEnv` (extra `marl`), not an id of Gymnasium:",
        "```python\nfrom biscale_env.envs.cluster.parallel_env import ClusterParallelEnv\n\n"
        "env = ClusterParallelEnv(episode_s=2.0)\nobservations, infos = env.reset(seed=0)\n"
        "while env.agents:\n"
        "    actions = {agent: env.action_space(agent).sample() for agent in env.agents}\n"
        "    observations, rewards, terminations, truncations, infos = env.step(actions)\n```",
        "## Agents",
        f"Of the default placement `{env.placement.name}`:",
        rows(("agents", "action", "observation"), lines),
        "## Episode",
        f"{env.episode_s:g} s, a step every {env.interval_s:g} s, "
        f"{env.options.source.rate_rps:.3g} requests per second by default.",
        "## Info",
        "Of every agent, at reset and at every step: "
        + ", ".join(f"`{key}`" for key in infos[env.agents[0]])
        + ".",
        "## Options",
        rows(("option", "meaning"), [(f"`{n}`", m) for n, m in arguments.items()]),
        "Others are those of the cluster, see [cluster.md](../cluster.md#as-environments).",
    ]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Every page by file name."""
    np.set_printoptions(precision=4)
    return {
        "prefill.md": phase_page("prefill"),
        "decode.md": phase_page("decode"),
        "cluster.md": cluster_page(),
        "many-agents.md": agents_page(),
    }


def write(folder: Path) -> None:
    """Write every page into a folder."""
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)
