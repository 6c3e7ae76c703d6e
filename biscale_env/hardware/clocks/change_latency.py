"""How long a clock change takes on this machine, and where the environments read it."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.hardware.clocks import owner
from biscale_env.hardware.clocks.backend import ClockBackend, ClockError
from biscale_env.models import coefficient_files
from biscale_env.models.coefficient import dump_fitted, rounded
from biscale_env.models.gpu_layer import ensemble_path

POLL_S = 0.0005
# rest at the start clock, several of the longest switch times published for Hopper (0.1 s, arXiv
# 2502.20075)
SETTLE_S = 0.3


@dataclass(frozen=True)
class Switch:
    """One measured clock change.

    Attributes:
        uuid: GPU.
        from_mhz: settled clock before.
        to_mhz: clock requested.
        call_s: duration of the driver call.
        seen_s: from the start of the call until the new clock was read back; NaN when it was not
            within the time allowed.
    """

    uuid: str
    from_mhz: float
    to_mhz: float
    call_s: float
    seen_s: float


def pairs_of(clocks_mhz: Sequence[float], count: int = 4) -> list[tuple[float, float]]:
    """All ordered pairs of ``count`` clocks spread over the range.

    Ups and downs, short and long.
    """
    picks = np.unique(
        np.asarray(clocks_mhz)[np.linspace(0, len(clocks_mhz) - 1, count).round().astype(int)]
    )
    return [(float(a), float(b)) for a, b in itertools.permutations(picks, 2)]


def within(
    clocks_mhz: Sequence[float], low_mhz: float | None, high_mhz: float | None
) -> list[float]:
    """Clocks within bounds, MHz; None is no bound.

    Raises:
        BiscaleError: there are not two of them.
    """
    usable = [
        clock
        for clock in clocks_mhz
        if (low_mhz is None or clock >= low_mhz) and (high_mhz is None or clock <= high_mhz)
    ]
    if len(usable) < 2:
        raise BiscaleError(
            f"the GPU supports {len(usable)} clocks within {low_mhz or 0:g} to "
            f"{high_mhz or float('inf'):g} MHz, and two are needed: give the description of this "
            "GPU with --gpu-spec"
        )
    return usable


def _until(backend: ClockBackend, uuid: str, freq_mhz: float, timeout_s: float) -> float:
    """Time until the clock is read back, s; NaN when it is not."""
    start = time.monotonic()
    while (now := time.monotonic()) - start < timeout_s:
        if abs(backend.read(uuid).freq_mhz - freq_mhz) < 1.0:
            return now - start
        time.sleep(POLL_S)
    return float("nan")


def measure(
    backend: ClockBackend,
    backend_name: str,
    uuid: str,
    pairs: Sequence[tuple[float, float]],
    repeats: int = 5,
    timeout_s: float = 1.0,
    settle_s: float = SETTLE_S,
    tell: Callable[[Switch], None] = lambda switch: None,
) -> list[Switch]:
    """Measure clock changes on one GPU; its clock is reset afterwards, whatever happens.

    An idle GPU may rest at an idle clock whatever is locked: measure while the engine serves, or
    with any busy process on it.

    Raises:
        BiscaleError: no privilege, the GPU has an owner, or it never reaches the clocks it is told
            to run.
    """
    if not backend.can_lock:
        raise BiscaleError("observe-only cannot measure clock changes: choose a backend that locks")
    found = []
    with owner.exclusive(backend, backend_name, uuid):
        for switch in _sweep(backend, uuid, pairs, repeats, timeout_s, settle_s):
            found.append(switch)
            tell(switch)
    if not any(np.isfinite(s.seen_s) for s in found):
        raise BiscaleError(
            f"{uuid} never showed a clock it was locked at: keep it busy while measuring, "
            "and look for power or thermal limits"
        )
    return found


def _sweep(
    backend: ClockBackend,
    uuid: str,
    pairs: Sequence[tuple[float, float]],
    repeats: int,
    timeout_s: float,
    settle_s: float,
) -> Iterator[Switch]:
    for _ in range(repeats):
        for start, target in pairs:
            backend.lock(uuid, start, start)
            _until(backend, uuid, start, timeout_s)
            time.sleep(settle_s)
            called = time.monotonic()
            backend.lock(uuid, target, target)
            call_s = time.monotonic() - called
            yield Switch(
                uuid, start, target, call_s, call_s + _until(backend, uuid, target, timeout_s)
            )


def summarise(switches: Sequence[Switch]) -> dict[str, float]:
    """Median and P99 of call and read-back times, s, and the fraction of changes that were seen."""
    call = np.array([s.call_s for s in switches])
    seen = np.array([s.seen_s for s in switches])
    known = seen[np.isfinite(seen)]
    return {
        "call_median_s": float(np.median(call)),
        "call_p99_s": float(np.quantile(call, 0.99)),
        "seen_median_s": float(np.median(known)) if known.size else float("nan"),
        "seen_p99_s": float(np.quantile(known, 0.99)) if known.size else float("nan"),
        "seen_share": known.size / seen.size,
    }


def as_frame(switches: Sequence[Switch]) -> pd.DataFrame:
    """One row per change."""
    return pd.DataFrame([asdict(s) for s in switches])


def family_files(folder: Path) -> list[Path]:
    """Coefficient files of a folder.

    Raises:
        BiscaleError: it has none.
    """
    paths = sorted(folder.glob("*-tp*.yaml"))
    if not paths:
        raise BiscaleError(
            f"{folder} holds no coefficient files: give the folder that `biscale fit --out` wrote"
        )
    return paths


def write_delays(folder: Path, switches: Sequence[Switch], seed: int = 0) -> list[Path]:
    """Put the measured delays into every coefficient file of a folder.

    The median as nominal, a sample into each member.

    Args:
        folder: coefficient files as ``biscale fit`` writes them; the environments read their delay
            from there.
        switches: measurements.
        seed: of the resampling.

    Returns:
        The files changed.

    Raises:
        BiscaleError: no coefficient file in the folder, or nothing was measured.
    """
    known = np.array([s.seen_s for s in switches if np.isfinite(s.seen_s)])
    paths = family_files(folder)
    if not known.size:
        raise ClockError("no clock change was seen, so there is no delay to write")
    rng = np.random.default_rng(seed)
    changed = []
    for path in paths:
        content = coefficient_files.read_model_file(path)
        fit = {**content.fit, "clock_latency": {**summarise(switches), "changes": len(switches)}}
        new = content.model_copy(update={"delay_s": rounded(float(np.median(known))), "fit": fit})
        members = ensemble_path(path)
        if members.is_file():
            table = pd.read_csv(members, comment="#")
            table[coefficient_files.DELAY_COLUMN] = rng.choice(known, len(table)).round(6)
            write_whole(members, table.to_csv(index=False))
        write_whole(path, dump_fitted(new))
        changed.append(path)
    return changed
