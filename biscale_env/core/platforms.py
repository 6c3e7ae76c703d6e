"""Which operating systems a part of the package runs on."""

import sys

from biscale_env.core.errors import BiscaleError


def need_linux(what: str) -> None:
    """Refuse where the kernel is not Linux.

    Args:
        what: the subject of the sentence, in the plural.

    Raises:
        BiscaleError: another operating system.
    """
    if not sys.platform.startswith("linux"):
        raise BiscaleError(
            f"{what} need Linux (this is {sys.platform}): use a Linux machine, or a container or "
            "virtual machine with Linux on this one"
        )
