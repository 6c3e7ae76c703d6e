"""Optional packages: what a command needs of them is said before it begins."""

import importlib.util
from collections.abc import Mapping

from biscale_env.core.errors import BiscaleError


def need_packages(what: str, extras: str, packages: Mapping[str, str]) -> None:
    """Refuse plainly where an optional package is missing.

    Args:
        what: subject and verb of the sentence, such as ``training needs``.
        extras: extras of this package that bring what is missing, with commas between them.
        packages: name to install it by, for each module that is imported.

    Raises:
        BiscaleError: names the first package that is not installed.
    """
    for module, package in packages.items():
        if importlib.util.find_spec(module) is None:
            raise BiscaleError(f"{what} {package}: pip install 'biscale-env[{extras}]'")
