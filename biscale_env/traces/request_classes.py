"""SLO classes of requests: which of an operator's promises each request is held to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.config.slo import NO_CLASS, Slo
from biscale_env.core.errors import BiscaleError

MOST_NAMES: Final = 127
NOBODY: Final = ("", NO_CLASS, "null", "nan", "n/a", "<na>")  # what stands where nothing is said


@dataclass(frozen=True, eq=False)
class RequestClasses:
    """The class of each request of a trace, in order of arrival.

    Attributes:
        names: names of the classes, each once.
        codes: class of each request, int8 of shape (n,), an index of ``names``; -1: of none.
    """

    names: tuple[str, ...]
    codes: NDArray[np.int8]

    def __post_init__(self) -> None:
        codes = np.array(self.codes, dtype=np.int8)
        codes.setflags(write=False)
        object.__setattr__(self, "codes", codes)

    @classmethod
    def of(cls, each: Sequence[Any]) -> "RequestClasses":
        """Classes by the name of each request's; None and an empty name: of none.

        Raises:
            BiscaleError: more different names than can be numbered.
        """
        told = ["" if name is None else str(name) for name in each]
        different = list(dict.fromkeys(told))
        number = {name: k for k, name in enumerate(different)}
        return cls.of_codes(different, np.array([number[name] for name in told], dtype=np.int64))

    @classmethod
    def of_codes(cls, texts: Sequence[str], codes: NDArray[Any]) -> "RequestClasses":
        """Classes by numbers into some texts, which may repeat or be empty; -1: of none.

        Raises:
            BiscaleError: more different names than can be numbered.
        """
        told = [text.strip() for text in texts]
        names = tuple(dict.fromkeys(name for name in told if name.lower() not in NOBODY))
        if len(names) > MOST_NAMES:
            raise BiscaleError(
                f"a trace can have at most {MOST_NAMES} SLO classes, got {len(names)} different "
                f"ones, such as '{names[0]}' and '{names[1]}': is this a column of classes?"
            )
        number = {name: k for k, name in enumerate(names)}
        table = np.array([*(number.get(name, -1) for name in told), -1], dtype=np.int8)
        return cls(names, table[codes])

    @classmethod
    def joined(cls, parts: Sequence["RequestClasses"]) -> "RequestClasses":
        """Consecutive pieces of one trace as one."""
        names = list(dict.fromkeys(name for part in parts for name in part.names))
        at = {name: k for k, name in enumerate(names)}
        codes = [np.array([*(at[name] for name in part.names), -1])[part.codes] for part in parts]
        return cls.of_codes(names, np.concatenate(codes))

    def __len__(self) -> int:
        return int(self.codes.size)

    def take(self, index: Any) -> "RequestClasses":
        """Some of the requests, in this order."""
        return replace(self, codes=self.codes[index])

    def each(self) -> NDArray[np.str_]:
        """Name of each request's class, (n,); `NO_CLASS` for none."""
        return np.array([*self.names, NO_CLASS])[self.codes]

    def content(self) -> bytes:
        """Bytes that are equal for equal classes, whatever their numbers."""
        told, codes = np.unique(self.each(), return_inverse=True)
        return "|".join(told.tolist()).encode() + codes.astype(np.int8).tobytes()

    def numbers(self, slo: Slo, name: str) -> NDArray[np.int8]:
        """Class of each request by its number in an SLO, int8 of shape (n,); 0: of none.

        Args:
            slo: an SLO with classes.
            name: the trace, for messages.

        Raises:
            BiscaleError: a request has a class that the SLO does not name.
        """
        known = {told: k for k, told in enumerate(slo.class_names)}
        used = [self.names[k] for k in np.unique(self.codes[self.codes >= 0])]
        unknown = next((told for told in used if told not in known), None)
        if unknown is not None:
            raise BiscaleError(
                f"{name} has requests of class '{unknown}', but SLO '{slo.name}' names "
                f"{', '.join(slo.classes)}: add it under 'classes:' of the SLO"
            )
        table = np.array([*(known.get(told, 0) for told in self.names), 0], dtype=np.int8)
        return table[self.codes]


def class_numbers(classes: RequestClasses | None, slo: Slo, n: int, name: str) -> NDArray[np.int8]:
    """Class of each of ``n`` requests by its number in an SLO; 0 where nobody says.

    Raises:
        BiscaleError: as of `RequestClasses.numbers`.
    """
    return np.zeros(n, dtype=np.int8) if classes is None else classes.numbers(slo, name)
