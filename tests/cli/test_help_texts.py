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


def options_of(command, path="biscale"):
    """Every option of a command and of those below it, with the command it belongs to."""
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            yield f"{path} {parameter.opts[0]}", parameter
    for name, child in getattr(command, "commands", {}).items():
        yield from options_of(child, f"{path} {name}")


def test_every_option_says_what_it_is():
    found = dict(options_of(typer.main.get_command(build())))
    assert len(found) > 200
    shown = {name: p for name, p in found.items() if not p.hidden}
    assert [name for name, p in shown.items() if not (p.help or "").strip()] == []
