"""Hooks of the site: the command line as a page, notebooks, and links that leave `docs/`."""

import os
import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from biscale_env.cli import build

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY_LINK = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?!docs/)([^)]+)\)")

FETCHED_SCRIPT = re.compile(r'<script\b[^>]*\ssrc="https?://[^"]*"[^>]*>\s*</script>')


def on_startup(**_: Any) -> None:
    """Execute notebooks on a small setting, with figures that need nothing from elsewhere."""
    os.environ.setdefault("BISCALE_NOTEBOOK_MINUTES", "1")
    os.environ.setdefault("PLOTLY_RENDERER", "notebook")


@event_priority(100)  # before the plugin that makes pages of notebooks
def on_files(files: Files, config: Any) -> Files:
    """Add `reference/cli.md`, made from the application itself, and the notebooks."""
    files.append(File.generated(config, "reference/cli.md", content=command_page()))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        place = (str(ROOT), config.site_dir, config.use_directory_urls)
        files.append(File(f"notebooks/{path.name}", *place))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Name files of the repository outside `docs/` instead of linking to what the site lacks."""
    own = page.file.src_uri.count("/")

    def named(match: re.Match[str]) -> str:
        ups = match[0].partition("](")[2].count("../")
        if ups > own and match[2].endswith(".ipynb"):
            return f"[{match[1]}]({'../' * own}{match[2]})"
        return f"{match[1]} (`{match[2]}` in the repository)" if ups > own else match[0]

    return REPOSITORY_LINK.sub(named, markdown)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Leave out scripts that notebooks would fetch from elsewhere: MathJax, without formulas."""
    return FETCHED_SCRIPT.sub("", html) if page.file.src_uri.endswith(".ipynb") else html


def command_page() -> str:
    """Every command with its help, arguments, options and defaults, as Markdown."""
    parts = ["# Command line\n\nMade from the commands themselves; `--help` shows the same."]
    parts += _sections(typer.main.get_command(build()), "biscale", 2)
    return "\n\n".join(parts) + "\n"


def _sections(command: Any, path: str, level: int) -> list[str]:
    parts = [f"{'#' * level} `{path}`", command.help or ""]
    rows = [_row(p) for p in command.params if not getattr(p, "hidden", False)]
    if rows:
        parts.append("\n".join(["| option | default | meaning |", "|---|---|---|", *rows]))
    for name, child in getattr(command, "commands", {}).items():
        parts += _sections(child, f"{path} {name}", min(level + 1, 5))
    return parts


def _row(parameter: Any) -> str:
    option = parameter.param_type_name == "option"
    names = ", ".join(parameter.opts) if option else str(parameter.name).upper()
    default = parameter.default
    plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    shown = f"`{default}`" if plain else ("required" if parameter.required else "")
    meaning = (getattr(parameter, "help", None) or "").replace("|", "\\|").replace("\n", " ")
    return f"| `{names}` | {shown} | {meaning} |"
