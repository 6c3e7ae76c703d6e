"""Engines that installed packages know how to listen to.

A package declares an entry point of the group ``biscale.engines`` that names a function::

    [project.entry-points."biscale.engines"]
    mine = "my_package:records"

    def records(address: str, stop: Callable[[], bool]) -> Iterator[EngineRecord]: ...

``biscale hw bridge --source mine:ADDRESS`` then forwards what it yields to the controller.
"""

import importlib.metadata
from collections.abc import Callable, Iterator

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.engines.hook.engine_record import EngineRecord

ENGINE_GROUP = "biscale.engines"


def installed_records(source: str, stop: Callable[[], bool]) -> Iterator[EngineRecord] | None:
    """Records of a source ``NAME:ADDRESS`` of an installed package; None where no name fits.

    Args:
        source: as given; what stands behind the first colon goes to the package.
        stop: True ends the stream; the package asks it at least twice a second.

    Raises:
        BiscaleError: the entry point cannot be imported.
    """
    name, _, address = source.partition(":")
    points = {point.name: point for point in importlib.metadata.entry_points(group=ENGINE_GROUP)}
    if name not in points:
        return None
    try:
        make = points[name].load()
    except Exception as error:  # whatever an import of foreign code raises
        raise _broken(name, points[name].value, error) from error
    return _checked(name, points[name].value, make, address, stop)


def _checked(
    name: str, value: str, make: Callable[..., object], address: str, stop: Callable[[], bool]
) -> Iterator[EngineRecord]:
    """Records of foreign code; a failure of it is one sentence."""
    try:
        for record in make(address, stop):  # type: ignore[attr-defined]
            if not isinstance(record, EngineRecord):
                kind = type(record).__name__
                raise TypeError(f"it yields a {kind}, but must yield EngineRecord")
            yield record
    except BiscaleError:
        raise
    except Exception as error:  # foreign code
        raise _broken(name, value, error) from error


def _broken(name: str, value: str, error: Exception) -> BiscaleError:
    said = str(error).splitlines()[0] if str(error) else ""
    return BiscaleError(
        f"engine '{name}': its entry point {value} fails with {type(error).__name__}: {said}"
    )
