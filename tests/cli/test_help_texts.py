"""What help texts say is shown: brackets that look like markup would vanish."""

import typer
from rich.text import Text

from biscale_env.cli import build


def texts(command, path="biscale"):
    """Every help text of a command and of those below it."""
    yield path, command.help or ""
    for parameter in command.params:
        yield f"{path} {parameter.name}", getattr(parameter, "help", None) or ""
    for name, child in getattr(command, "commands", {}).items():
        yield from texts(child, f"{path} {name}")


def test_every_word_of_every_help_text_is_shown():
    found = dict(texts(typer.main.get_command(build())))
    assert "default: runs/day" in found["biscale reproduce day out"]
    assert len(found) > 200
    for name, text in found.items():
        assert Text.from_markup(text).plain == text, name
