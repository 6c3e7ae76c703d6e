"""A learned coarse policy as one small file: forecast, measured costs, default price, card."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from agents.coarse.load_forecast import FORECAST_ID, LoadForecast
from agents.coarse.window_costs import WindowCosts
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import open_whole

FORMAT: Final = 1
_FORECAST: Final = tuple(LoadForecast.__annotations__)
_COSTS: Final = ("capacity_rps", "power_w", "missed")


@dataclass(frozen=True)
class CoarseCheckpoint:
    """What a coarse agent is made of.

    Attributes:
        forecast: of the next window's load.
        costs: of windows.
        window_s: length of the windows whose loads were learned from, s.
        prices: lowest and highest price that makes sense.
        price: default price of a request that misses the SLO; unit: energy of a mean request.
        card: who made it, from what, with what result; free form.
    """

    forecast: LoadForecast
    costs: WindowCosts
    window_s: float
    prices: tuple[float, float]
    price: float
    card: Mapping[str, Any] = field(default_factory=dict)

    def at_price(self, price: float) -> "CoarseCheckpoint":
        """The same with another default price."""
        return replace(self, price=price)

    def save(self, path: Path) -> None:
        """Write the file in one piece."""
        head = {
            "format": FORMAT,
            "phase": "cluster",
            "feature_id": FORECAST_ID,
            "window_s": self.window_s,
            "prices": list(self.prices),
            "price": self.price,
            "kinds": [list(kind) for kind in self.costs.kinds],
            "about": self.costs.about,
            "card": dict(self.card),
        }
        arrays = {name: getattr(self.forecast, name) for name in _FORECAST}
        arrays |= {name: getattr(self.costs, name) for name in _COSTS}
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_whole(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, head=np.array(json.dumps(head)), **arrays)


def load_coarse(path: Path) -> CoarseCheckpoint:
    """Read a checkpoint.

    Raises:
        BiscaleError: missing, corrupt, of another kind or format, or made for other features.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            head = json.loads(str(stored["head"]))
            phase = head.get("phase")
            if phase == "cluster":
                arrays = {n: stored[n].astype(np.float64) for n in (*_FORECAST, *_COSTS)}
    except FileNotFoundError:
        raise BiscaleError(f"checkpoint {path} does not exist") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise BiscaleError(
            f"checkpoint {path} cannot be read: corrupt, or not a checkpoint of biscale train"
        ) from None
    if phase != "cluster":
        raise BiscaleError(f"checkpoint {path} is for {phase}, not for the cluster")
    if (head.get("format"), head.get("feature_id")) != (FORMAT, FORECAST_ID):
        raise BiscaleError(
            f"checkpoint {path} was made for format {head.get('format')} and features "
            f"'{head.get('feature_id')}', but this version has {FORMAT} and '{FORECAST_ID}'"
        )
    if not all(np.isfinite(a).all() for a in arrays.values()):
        raise BiscaleError(f"checkpoint {path} holds numbers that are not finite: train again")
    kinds = tuple((str(p), int(tp), int(n)) for p, tp, n in head["kinds"])
    measured = {name: arrays[name] for name in _COSTS}
    costs = WindowCosts(kinds=kinds, about=head["about"], **measured)
    forecast = LoadForecast(**{name: arrays[name] for name in _FORECAST})
    low, high = head["prices"]
    return CoarseCheckpoint(
        forecast, costs, head["window_s"], (low, high), head["price"], head["card"]
    )
