"""`biscale profile`: latency and power of iterations, as the table that `biscale fit` reads."""

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from biscale_env.config import InstanceSpec, Llm, load_llm
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.hardware.clocks import owner
from biscale_env.hardware.clocks.backend import ClockBackend
from biscale_env.hardware.clocks.caller import as_caller
from biscale_env.hardware.replay.recorder import Telemetry
from biscale_env.models import IterationModel, instance_model, physics
from biscale_env.models.fit.profile_table import ONE_GPU_LACKS

COLUMNS = (
    "phase",
    "tp",
    "dtype",
    "batch",
    "new_tokens",
    "prefix",
    "context",
    "latency_s",
    "power_w",
    "freq_mhz",
    "scope",
)
MIN_REPEATS = 32
MINIATURE = {
    "layers": 2,
    "hidden": 256,
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 16,
    "intermediate": 1024,
    "vocabulary": 512,
}
"""Shapes of a rehearsal: the smallest Llama that TP 8 divides and a CPU runs in milliseconds."""
MEMORY_FRACTION = 0.85  # of the device that weights and caches may fill


@dataclass(frozen=True)
class ProfilePoint:
    """One kind of iteration, in the columns of a profile table.

    Attributes:
        phase: ``prefill`` or ``decode``.
        tp: tensor parallel degree whose shard is run.
        batch: sequences.
        new_tokens: prefill, new tokens per sequence; 0 in decode.
        prefix: prefill, tokens of each sequence in the cache before; 0 in decode.
        context: decode, tokens of each sequence that attention reads; 0 in prefill.
    """

    phase: str
    tp: int
    batch: int
    new_tokens: int
    prefix: int
    context: int

    @property
    def rows(self) -> int:
        """New tokens per sequence that the device computes."""
        return self.new_tokens or 1

    @property
    def before(self) -> int:
        """Tokens per sequence that are in the cache when the iteration starts."""
        return self.prefix if self.phase == "prefill" else self.context - 1


def prefill_points(tp: int, quick: bool = False) -> list[ProfilePoint]:
    """Batches of equal prompts from a chat turn to four full budgets."""
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    prefixes: tuple[int, ...] = (2048, 4096, 8192)
    if quick:
        lengths, batches, prefixes = (128, 512, 2048, 8192), (1, 4), (4096,)
    return [
        ProfilePoint("prefill", tp, b, n, 0, 0) for n in lengths for b in batches if n * b <= 16_384
    ] + [ProfilePoint("prefill", tp, 1, 2048, p, 0) for p in prefixes]


def decode_points(tp: int, quick: bool = False) -> list[ProfilePoint]:
    """Batches up to an engine's default limit, contexts up to long chats."""
    batches: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128, 192, 256)
    contexts: tuple[int, ...] = (256, 1024, 2048, 4096)
    if quick:
        batches, contexts = (1, 16, 64, 256), (512, 2048)
    return [ProfilePoint("decode", tp, b, 0, 0, c) for b in batches for c in contexts]


def miniature_points(tp: int) -> list[ProfilePoint]:
    """A grid that a CPU goes through in seconds, and just enough for the fit with two clocks."""
    prompts = [ProfilePoint("prefill", tp, b, n, 0, 0) for n in (16, 64, 256) for b in (1, 4)]
    return prompts + [
        ProfilePoint("decode", tp, b, 0, 0, c) for b in (1, 4, 16, 64) for c in (64, 256)
    ]


def grid_points(
    degrees: Sequence[int], phase: str = "both", quick: bool = False, miniature: bool = False
) -> list[ProfilePoint]:
    """All points of a sweep, one TP degree after the other.

    Args:
        degrees: TP degrees whose shard is run.
        phase: ``both``, ``prefill`` or ``decode``.
        quick: a coarse grid.
        miniature: the grid of a rehearsal.
    """
    points: list[ProfilePoint] = []
    for tp in degrees:
        points += (
            miniature_points(tp)
            if miniature
            else prefill_points(tp, quick) + decode_points(tp, quick)
        )
    return [point for point in points if phase in ("both", point.phase)]


@dataclass(frozen=True)
class ProfileSettings:
    """How to measure.

    Attributes:
        llm: model whose shapes are run.
        device: ``cuda`` or ``cpu``.
        layers: layers to run; None all of them. Fewer are scaled up to all.
        warm_s: running before the measurement, so that clock and power settle.
        measure_s: shortest measurement; the energy counter needs seconds.
        repeats: fewest repetitions.
        clocks_mhz: clocks to lock in turn; empty leaves the clock alone.
        graphs: replay CUDA graphs, as engines do.
        miniature: run a tiny model in place of ``llm``: a rehearsal of the command, evidence about
            nothing.
    """

    llm: str = "llama-3.3-70b"
    device: str = "cuda"
    layers: int | None = None
    warm_s: float = 1.0
    measure_s: float = 3.0
    repeats: int = MIN_REPEATS
    clocks_mhz: tuple[float, ...] = ()
    graphs: bool = True
    miniature: bool = False


class Profiler:
    """Measures points on one GPU."""

    def __init__(
        self,
        settings: ProfileSettings,
        backend: ClockBackend | None,
        gpu: str = "0",
        llm: Llm | None = None,
    ) -> None:
        """Prepare.

        Args:
            settings: how to measure.
            backend: reads power and clocks; None leaves both out (NaN).
            gpu: index or UUID of the GPU for the backend; the one that ``device`` is.
            llm: model description; default the named one.

        Raises:
            BiscaleError: no such device, or clocks are asked for without a backend that can lock.
        """
        import torch

        if settings.device == "cuda" and not torch.cuda.is_available():
            raise BiscaleError(
                "there is no CUDA device here: profile on a machine with an NVIDIA GPU, "
                "or use --device cpu to try the command"
            )
        if settings.clocks_mhz and (backend is None or not backend.can_lock):
            raise BiscaleError(
                "--clocks needs a backend that can lock clocks (nvml as root, or zeusd); "
                "--clocks default never touches them"
            )
        if settings.repeats < MIN_REPEATS:
            raise BiscaleError(
                f"power needs at least {MIN_REPEATS} repetitions, got {settings.repeats}"
            )
        self.settings, self.backend = settings, backend
        self.llm = llm or load_llm(settings.llm)
        if settings.miniature:
            self.llm = self.llm.model_copy(update={"name": "miniature", **MINIATURE})
        self.uuid = backend.device(gpu).uuid if backend else ""
        self._torch = torch
        self._shards: dict[int, Any] = {}

    def measure(self, points: Sequence[ProfilePoint]) -> Iterator[dict[str, Any]]:
        """One row per clock and point, as they are measured; clocks are reset whatever happens."""
        clocks = self.settings.clocks_mhz or (None,)
        with contextlib.ExitStack() as stack:
            if self.settings.clocks_mhz:
                assert self.backend is not None  # checked at the start
                stack.enter_context(owner.exclusive(self.backend, self.backend.name, self.uuid))
            for clock in clocks:
                if clock is not None and self.backend is not None:
                    self.backend.lock(self.uuid, clock, clock)
                for point in points:
                    yield self._point(point)

    def _shard(self, tp: int) -> Any:
        from biscale_env.hardware.profile.shard import Shard, ShardShape

        if tp not in self._shards:
            self._shards.clear()  # one at a time: two would not fit
            if self.settings.device == "cuda":
                self._torch.cuda.empty_cache()
            dtype = self._torch.bfloat16 if self.settings.device == "cuda" else self._torch.float32
            self._shards[tp] = Shard(
                ShardShape.of(self.llm, tp, self.settings.layers), self.settings.device, dtype
            )
        return self._shards[tp]

    def _runner(self, point: ProfilePoint) -> Callable[[], None]:
        """A function that runs the iteration once."""
        torch, shard = self._torch, self._shard(point.tp)
        caches = shard.cache(
            point.batch, point.before + point.rows, self._cache_count(shard, point)
        )
        size = (point.batch * point.rows, self.llm.hidden)
        x = torch.randn(size, device=self.settings.device).to(shard.dtype)

        def run() -> None:
            with torch.inference_mode():
                shard.iteration(x, point.batch, caches, point.before)

        if self.settings.device != "cuda" or not self.settings.graphs:
            return run
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            shard.iteration(x, point.batch, caches, point.before)
        return graph.replay  # type: ignore[no-any-return]

    def _cache_count(self, shard: Any, point: ProfilePoint) -> int:
        """As many caches as layers, or as fit."""
        s = shard.shape
        if self.settings.device != "cuda":
            return int(s.layers)
        one = 2 * point.batch * (point.before + point.rows) * s.kv_heads * s.head_dim * 2
        self._torch.cuda.empty_cache()
        free, total = self._torch.cuda.mem_get_info()
        room = free - (1 - MEMORY_FRACTION) * total
        if room < one:
            raise BiscaleError(
                f"{point} does not fit into the memory that is left ({free / 1e9:.1f} GB)"
            )
        return int(min(s.layers, max(room // one, 1)))

    def _wait(self) -> None:
        if self.settings.device == "cuda":
            self._torch.cuda.synchronize()

    def _point(self, point: ProfilePoint) -> dict[str, Any]:
        run, s = self._runner(point), self.settings
        repeats = max(s.repeats, math.ceil(s.measure_s / max(self._warm_up(run), 1e-6)))
        telemetry = Telemetry(self.backend, {"gpu": [self.uuid]}) if self.backend else None
        if telemetry:
            telemetry.start()
        before_j = self._energy_j()
        begin = time.monotonic()
        for _ in range(repeats):
            run()
        self._wait()
        took_s = time.monotonic() - begin
        energy_j = self._energy_j() - before_j
        freqs = []
        if telemetry:
            telemetry.stop()
            freqs = telemetry.frame()["freq_mhz"].tolist()
        row = {
            **asdict(point),
            "dtype": "bf16",
            "latency_s": took_s / repeats * self.llm.layers / (s.layers or self.llm.layers),
            "power_w": energy_j / took_s,
            "freq_mhz": float(np.mean(freqs)) if freqs else math.nan,
            "scope": "shard",
        }
        return {name: row[name] for name in COLUMNS}

    def _warm_up(self, run: Callable[[], None]) -> float:
        """Run until clock and power have settled; time of the last iteration, s."""
        end = time.monotonic() + self.settings.warm_s
        once_s = math.inf
        while time.monotonic() < end or math.isinf(once_s):
            begin = time.monotonic()
            run()
            self._wait()
            once_s = time.monotonic() - begin
        return once_s

    def _energy_j(self) -> float:
        return self.backend.energy_j(self.uuid) if self.backend else math.nan


def provenance(profiler: Profiler) -> dict[str, Any]:
    """Where a table comes from: machine, versions, settings. Kept beside it."""
    torch, s = profiler._torch, profiler.settings
    device = "CPU (a rehearsal of the command; not evidence about any GPU)"
    if s.device == "cuda":
        device = torch.cuda.get_device_name()
    if s.miniature:
        real = device.split(" (")[0]
        device = f"{real} (a rehearsal with a miniature model; not evidence about any GPU or model)"
    return {
        "device": device,
        "driver": getattr(profiler.backend, "driver_version", lambda: "none")(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "llm": profiler.llm.name,
        "settings": asdict(s),
        "clocks": "locked in turn" if s.clocks_mhz else "default, never touched",
        "missing": "all-reduce between GPUs and the engine's host work: "
        "this is one shard on one GPU",
        "unix_s": time.time(),
    }


def write_table(path: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write table and provenance (``.yaml`` beside it), whole or not at all."""
    text = io.StringIO()
    text.write(
        f"# {about.get('device', '?')}, one tensor-parallel shard without all-reduce and host; "
        f"see {path.with_suffix('.yaml').name}\n"
    )
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    # power and clock are left out where nothing could be read
    frame.dropna(axis="columns", how="all").to_csv(text, index=False)
    with as_caller():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.getvalue())
        write_whole(path.with_suffix(".yaml"), yaml.safe_dump(_plain(about), sort_keys=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def predictions(
    frame: pd.DataFrame, instance: InstanceSpec = InstanceSpec(), hbm_ratio: float = 1.0
) -> pd.DataFrame:
    """What a fitted model says about a table.

    Without the parts that one GPU cannot show: all-reduce and host.

    Args:
        frame: table as measured.
        instance: fitted model, and GPU and LLM where they are others than the model's.
        hbm_ratio: HBM bandwidth of the measured GPU over the model's (H200 over H100: 4.8 / 3.35).

    Returns:
        Columns ``latency_s``, ``power_w``, ``freq_mhz`` (effective), in the order of the table.
    """
    rows = []
    for row in frame.to_dict("records"):
        point = instance.changed(tp=int(row["tp"]), dtype=row["dtype"])
        rows.append(_predict(instance_model(row["phase"], point), row, hbm_ratio))
    return pd.DataFrame(rows, columns=["latency_s", "power_w", "freq_mhz"], index=frame.index)


def _predict(
    model: IterationModel, row: dict[Any, Any], hbm_ratio: float
) -> tuple[float, float, float]:
    c = model.coefficients._replace(
        **ONE_GPU_LACKS,
        weights_s=model.coefficients.weights_s / hbm_ratio,
        attn_decode_s=model.coefficients.attn_decode_s / hbm_ratio,
    )
    batch, new, prefix = float(row["batch"]), float(row["new_tokens"]), float(row["prefix"])
    prefill = row["phase"] == "prefill"
    tokens, attn = (batch * new, batch * new * (new / 2 + prefix)) if prefill else (batch, 0.0)
    cached = 0.0 if prefill else batch * float(row["context"])
    asked = model.gpu.freq_max_mhz if not np.isfinite(row["freq_mhz"]) else float(row["freq_mhz"])
    freq = physics.effective_freq_ghz(
        c, tokens, attn, cached, batch, asked / 1e3, model.gpu.freq_min_mhz / 1e3
    )
    return (
        float(physics.latency_s(c, tokens, attn, cached, batch, freq)),
        float(physics.power_w(c, tokens, attn, cached, batch, freq)),
        freq * 1e3,
    )
