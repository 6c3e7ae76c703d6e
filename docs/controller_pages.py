"""One page per controller, made from its code: docs/controllers/.

Law, source and what was changed are the docstrings of the controllers, parameters and their
defaults are read from the classes, and the figure is a burst, simulated.
"""

import inspect
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from environment_pages import attributes, code, prose, rows

from biscale_env.core.svg import save_svg, svg_axes
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.experiment.interactive import second_by_second
from biscale_env.evaluation.report.drawing.figdata import busiest_window
from biscale_env.evaluation.report.drawing.palette import GRID, INK, styles
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.policies import resolve_policy
from biscale_env.traces import Trace, generate
from controllers.prefill.mpc_options import MpcOptions
from controllers.registry import ENTRIES, policy_tunables

HEAD = "Made by `python docs/update.py controllers` from the controller itself."
PHASES = ("prefill", "decode")
BURST_RPS = {"prefill": 2.2, "decode": 19.0}
WINDOW_S = {"prefill": 24.0, "decode": 60.0}


@dataclass(frozen=True)
class PageOf:
    """A page.

    Attributes:
        title: heading.
        names: policies on it, the first one is drawn.
        note: what the code does not say, Markdown.
    """

    title: str
    names: tuple[str, ...]
    note: str = ""


CONSTANT = (
    "`max` is what every table is relative to. Comparisons also make `static-best`, the best"
    " constant clock of the workloads that tune, and `static-hindsight`, that of the judged ones"
    " themselves: what any controller has to beat ([how we compare](../how-we-compare.md))."
)
PAGES: Mapping[str, PageOf] = {
    "constant": PageOf("Constant and random clocks", ("max", "static", "random"), CONSTANT),
    "mpc": PageOf(
        "MPC for prefill",
        ("mpc", "mpc-plus"),
        "`mpc-plus` switches on what helped in the ablation (`biscale compare --experiment"
        " ablation`); `mpc` is the paper's. [The reference in do-mpc](mpc-dompc.md) plans the same"
        " clocks with a general solver.",
    ),
    "mpc-dompc": PageOf(
        "The same MPC in do-mpc",
        ("mpc-dompc",),
        "For those who want to change the problem: objective, constraints and horizon are CasADi"
        " expressions. [mpc](mpc.md) gives the same clocks in microseconds.",
    ),
    "mpc-greedy": PageOf("The paper's search for prefill clocks", ("mpc-greedy",)),
    "slack": PageOf(
        "Slack rule for decode",
        ("slack", "slack-plus"),
        "`slack-plus` is `slack:fine=true`, what helped in the ablation.",
    ),
    "ecofreq": PageOf("EcoFreq (VoltanaLLM)", ("ecofreq",)),
    "throttllem": PageOf("throttLL'eM", ("throttllem",)),
    "greenllm": PageOf("GreenLLM", ("greenllm",)),
    "dynamollm": PageOf("DynamoLLM", ("dynamollm",)),
    "agft": PageOf("AGFT", ("agft",)),
}


def classes(page: PageOf) -> dict[str, Any]:
    """The classes behind a page's policies, each with the phases that it serves."""
    found: dict[Any, list[str]] = {}
    for name in page.names:
        for phase in ENTRIES[name].paths:
            served = found.setdefault(ENTRIES[name].load(phase), [])
            if phase not in served:
                served.append(phase)
    return {" and ".join(served) + f": `{of.__name__}`": of for of, served in found.items()}


def law(of: type) -> str:
    """The docstring of the module that holds a controller: its law, indented lines as code."""
    return prose_with_code(inspect.getdoc(import_module(of.__module__)) or "")


def prose_with_code(text: str) -> str:
    """A docstring as Markdown; what is indented behind ``::`` becomes a block of code."""
    parts = re.split(r"::\n\n((?:    .*\n?|\n)+)", text)
    plain = [re.sub(r":mod:`([^`]+)`", r"`\1`", code(part)) for part in parts[::2]]
    blocks = [":\n\n```text\n" + _block(part) + "\n" for part in parts[1::2]]
    return "".join(itertools.chain(*itertools.zip_longest(plain, blocks, fillvalue=""))).strip()


def _block(indented: str) -> str:
    return "\n".join(line[4:] for line in indented.strip("\n").splitlines()) + "\n```\n"


def parameters(of: type) -> str:
    """Parameters with defaults and meanings, of the constructor or of the options it takes."""
    meant = attributes(of.__init__, "Args")  # type: ignore[misc]
    signature = inspect.signature(of)
    lines = [
        (f"`{name}`", f"`{one.default}`", meant.get(name, ""))
        for name, one in list(signature.parameters.items())[1:]
        if one.kind is not one.VAR_KEYWORD and name != "options"
    ]
    if any(p.kind is p.VAR_KEYWORD or n == "options" for n, p in signature.parameters.items()):
        known = {line[0] for line in lines}
        lines += [
            (f"`{name}`", f"`{getattr(MpcOptions, name)}`", text)
            for name, text in attributes(MpcOptions).items()
            if f"`{name}`" not in known
        ]
    lines.append(("`member`", "`-1`", "ensemble member whose coefficients it takes for true"))
    return rows(("parameter", "default", "meaning"), [tuple(map(_plain, line)) for line in lines])


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|")


def tuned(page: PageOf) -> str:
    """What tuning may choose, per policy and phase."""
    lines = []
    for name in page.names:
        for phase in ENTRIES[name].paths:
            for key, values in policy_tunables(name, phase).items():
                shown = ", ".join("highest" if v is None else f"{v:g}" for v in values)
                lines.append((f"`{name}`", phase, f"`{key}`", shown))
    if not lines:
        return "Nothing is free: the table shows it as it is."
    return rows(("policy", "phase", "parameter", "values, the default first"), lines)


def page_text(key: str, page: PageOf) -> str:
    """The whole page."""
    phases = [p for p in PHASES if p in ENTRIES[page.names[0]].paths]
    parts = [f"# {page.title}", HEAD, "Names: " + ", ".join(f"`{n}`" for n in page.names) + "."]
    if page.note:
        parts.append(page.note)
    laws: dict[str, str] = {}
    for title, of in classes(page).items():
        said = law(of)
        if said not in laws.values():
            laws[title] = said
    parts += ["## Law", *laws.values(), "## Source, and what was changed"]
    for title, of in classes(page).items():
        parts += [f"**{title[0].upper() + title[1:]}** (`{of.__module__}`)", prose(of)]
        parts += [parameters(of)]
    parts += ["## Tuned over", tuned(page), "## In a burst"]
    for phase in phases:
        name = page.names[0]
        parts.append(f"![`{name}` and max clock in a {phase} burst]({key}-{phase}.svg)")
    parts.append(
        f"*`{page.names[0]}` with its defaults (colour) and max clock (grey) on the same requests:"
        " requests in the instance, effective clock, power per GPU while it works; a clock"
        " change takes 50 ms.*"
    )
    return "\n\n".join(parts) + "\n"


def burst_of(phase: str) -> Trace:
    """The busiest seconds of five minutes of a generated conversation workload."""
    whole = generate("azure-conv-like", rate_rps=BURST_RPS[phase], duration_s=300.0, seed=2)
    begin, end = busiest_window(
        whole.arrival_s, whole.prompt_tokens, whole.duration_s, width_s=WINDOW_S[phase], core_s=6.0
    )
    return whole.window(begin, end)


def draw(folder: Path) -> None:
    """The bursts of every page."""
    for phase in PHASES:
        plant = Plant(PlantSettings.of(phase, actuation_delay_s=0.05, drain=phase == "prefill"))
        trace = burst_of(phase)
        names = [p.names[0] for p in PAGES.values() if phase in ENTRIES[p.names[0]].paths]
        seen = {
            name: second_by_second(
                rollout(resolve_policy(name, plant), plant, [trace], time_probe=False)[0]
            )
            for name in dict.fromkeys(["max", *names])
        }
        for key, page in PAGES.items():
            if page.names[0] in seen and phase in ENTRIES[page.names[0]].paths:
                one_burst(folder / f"{key}-{phase}.svg", page.names[0], seen, WINDOW_S[phase])


def one_burst(out: Path, name: str, seen: Mapping[str, Any], window_s: float) -> None:
    """Three strips: requests, clock, power; max clock behind."""
    figure, axes = svg_axes(3, 1, (8.0, 4.6), sharex=True)
    figure.set_layout_engine("constrained")
    look = styles(["max", name])
    for other in dict.fromkeys(("max", name)):
        frame = seen[other][seen[other]["time_s"] < window_s]
        requests = frame["queue_requests"] + frame["batch_requests"]
        lines = (requests, frame["freq_mhz"], frame["power_w"])
        for ax, values in zip(axes, lines, strict=True):
            ax.step(
                frame["time_s"],
                np.asarray(values, dtype=float),
                where="post",
                color=look[other].color,
                lw=1.0 if other == "max" and name != "max" else 1.5,
                label=other,
            )
    heads = ("requests", "clock, MHz", "power per GPU, W")
    for ax, head in zip(axes, heads, strict=True):
        ax.set_ylabel(head, color=INK)
        ax.grid(color=GRID)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_ylim(bottom=0)
    axes[0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False, ncols=2)
    axes[-1].set_xlabel("time, s", color=INK)
    axes[-1].set_xlim(0, window_s)
    figure.patch.set_facecolor("white")
    save_svg(figure, out)


def index() -> str:
    """The list of pages."""
    lines = []
    for key, page in PAGES.items():
        phases = [p for p in PHASES if p in ENTRIES[page.names[0]].paths]
        names = ", ".join(f"`{n}`" for n in page.names)
        of = ENTRIES[page.names[0]].load(phases[0])
        lines.append((f"[{page.title}]({key}.md)", names, ", ".join(phases), _first(of)))
    lines.append(("[Learned agents](../agents.md)", "`agent`", "prefill, decode", "Trained here"))
    lines.append(
        ("[Optimum with hindsight](oracle.md)", "`oracle`", "prefill, decode", "Knows the future")
    )
    return (
        "# Controllers\n\n" + HEAD + "\n\nNames, parameters and how to add one's own:"
        " [policies](../policies.md). Who wins where: [results](../results.md).\n\n"
        + rows(("page", "names", "phases", "what it is"), lines)
        + "\n"
    )


def _first(of: type) -> str:
    return code((inspect.getdoc(of) or "").splitlines()[0]).rstrip(".:")


def oracle_page() -> str:
    """The optimum: what its modules say."""
    make = import_module("controllers.oracle.make")
    parts = [
        "# Optimum with hindsight",
        HEAD,
        "Name: `oracle`, in `biscale compare` and `evaluate` only, since it is made from the whole"
        " workload.",
        prose_with_code(inspect.getdoc(make) or ""),
    ]
    for module in ("prefill_optimum", "decode_search", "decode_bound"):
        of = import_module(f"controllers.oracle.{module}")
        parts += [f"## `controllers.oracle.{module}`", prose_with_code(inspect.getdoc(of) or "")]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Every page by file name."""
    texts = {f"{key}.md": page_text(key, page) for key, page in PAGES.items()}
    return {"index.md": index(), **texts, "oracle.md": oracle_page()}


def write(folder: Path) -> None:
    """Write every page and figure into a folder."""
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)
    draw(folder)
