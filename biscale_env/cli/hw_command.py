"""``biscale hw``: real GPUs and engines.

What works here, how fast clocks change, the actuator, the controllers, the emulated engines, and
resetting clocks after a crash.
"""

import typer

from biscale_env.cli.hw import (
    clock_commands,
    deployment_command,
    engine_commands,
    observe_command,
    profile_command,
    replay_command,
)
from biscale_env.cli.hw.hw_options import need_hardware

group = typer.Typer(
    no_args_is_help=True, help="Real GPUs and engines: check, measure, actuate, emulate, restore."
)


def register(app: typer.Typer) -> None:
    """Add the ``hw`` group and the commands that use it."""
    clock_commands.register(group)
    engine_commands.register(group)
    deployment_command.register(group)
    observe_command.register(group)
    app.add_typer(group, name="hw")
    replay_command.register(app)
    profile_command.register(app)


@group.callback()
def prepare(context: typer.Context) -> None:
    """Real GPUs and engines: check, measure, actuate, emulate, restore."""
    if context.invoked_subcommand == "doctor":  # which says itself which package is missing
        from biscale_env.core.platforms import need_linux

        need_linux("the hardware commands")
    else:
        need_hardware()
