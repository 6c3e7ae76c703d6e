"""Structured records for compiled code, described by a class with an annotation per field."""

import numpy as np
from numpy.typing import NDArray

Records = NDArray[np.void]
KINDS = {float: np.float64, int: np.int64}


def record_dtype(fields: type) -> np.dtype[np.void]:
    """The dtype of records with the annotated fields of a class, in order.

    Args:
        fields: class whose annotations are ``float`` or ``int``; compiled code that is handed one
            record is annotated with it.
    """
    return np.dtype([(name, KINDS[kind]) for name, kind in fields.__annotations__.items()])
