"""`IterationModel`: latency and power of one engine iteration of one configuration.

With its ensemble, on the GPU and LLM of the fit or moved to others.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biscale_env.config import (
    DEFAULT_GPU,
    DEFAULT_MODEL,
    Gpu,
    InstanceSpec,
    Llm,
    load_gpu,
    load_llm,
)
from biscale_env.config.loader import read_bytes
from biscale_env.core.errors import BiscaleError, BiscaleWarning
from biscale_env.core.jit import compiled
from biscale_env.models import physics
from biscale_env.models.coefficient_files import (
    WORK_AXES,
    ModelFile,
    Phase,
    any_file,
    find_file,
    parse_model_file,
    read_members,
)
from biscale_env.models.gpu_layer import (
    DELAY,
    DTYPES,
    LayerFiles,
    ensemble_path,
    layer_files,
    layer_path,
    names_in_layer,
)
from biscale_env.models.physics import COEFFICIENT_DTYPE, Coefficients
from biscale_env.models.transfer import Hardware, moved_file, plan_move

ModelName = str
DEFAULT_NAME = DEFAULT_MODEL
Floats = NDArray[np.float64]


def as_record(coefficients: Coefficients) -> np.record:
    """Coefficients as one structured record, the form that compiled code takes."""
    return np.array([tuple(coefficients)], dtype=COEFFICIENT_DTYPE).view(np.recarray)[0]


@compiled
def effective_freq_ghz(
    c: np.record,
    tokens: Floats,
    attn_work: Floats,
    cached: Floats,
    n_seq: Floats,
    freq_ghz: Floats,
    freq_min_ghz: float,
    out: Floats,
) -> None:
    """Effective clock under the power cap of many iterations, compiled: fills ``out``, GHz.

    All arrays of equal length.
    """
    for i in range(out.size):
        out[i] = physics.effective_freq_ghz(
            c, tokens[i], attn_work[i], cached[i], n_seq[i], freq_ghz[i], freq_min_ghz
        )


@dataclass(frozen=True)
class IterationModel:
    """Latency, power and energy of iterations, under the power cap.

    Work arguments broadcast against each other: ``tokens`` (GEMM rows), ``attn_work`` (token^2),
    ``cached`` (KV tokens), ``n_seq`` (requests), ``freq_mhz`` (requested SM clock, MHz). Results
    have the broadcast shape. Methods with ``member`` take an index into the ensemble, or None (-1)
    for the nominal coefficients.

    Attributes:
        content: the coefficient file, with the provenance of every coefficient.
        coefficients: the nominal values.
        gpu: the GPU that the numbers are for.
        llm: the LLM that the numbers are for.
        fitted_on: GPU and LLM of the fit where they are others, for messages; empty where not.
        digest: hash of everything that the numbers depend on.
    """

    content: ModelFile
    coefficients: Coefficients
    gpu: Gpu
    llm: Llm
    _members: np.recarray = field(repr=False)
    _delays_s: Floats = field(repr=False)
    fitted_on: str = ""
    digest: str = ""

    @property
    def phase(self) -> Phase:
        """``prefill`` or ``decode``."""
        return self.content.phase

    @property
    def tp(self) -> int:
        """GPUs per instance."""
        return self.content.tp

    @property
    def ep(self) -> int:
        """Groups that the experts are spread over."""
        return self.content.ep

    @property
    def dtype(self) -> str:
        """``bf16``, ``fp8`` or ``mxfp4``."""
        return self.content.dtype

    @property
    def name(self) -> ModelName:
        """Name of the model family."""
        return self.content.name

    @property
    def domain(self) -> dict[str, tuple[float, float]]:
        """Validity domain: per work axis the (lowest, highest) value of the fitted points."""
        return dict(self.content.box)

    @property
    def kv_capacity_tokens(self) -> int:
        """KV-cache tokens that fit beside the weights.

        0 where the weights alone fill the memory.
        """
        try:
            return self.llm.kv_capacity_tokens(self.gpu, self.tp, self.content.dtype)
        except BiscaleError:
            return 0

    @property
    def n_members(self) -> int:
        """Members in the ensemble."""
        return len(self._members)

    def _index(self, member: int | None) -> int:
        k = -1 if member is None else int(member)
        if not -1 <= k < self.n_members:
            raise BiscaleError(
                f"ensemble member {k} does not exist: choose 0 to {self.n_members - 1}, or -1 for "
                "the nominal model"
            )
        return k

    def member(self, k: int | None = None) -> Coefficients:
        """Coefficients of member ``k`` of the ensemble; None or -1 is the nominal model.

        Raises:
            BiscaleError: no such member.
        """
        index = self._index(k)
        return (
            self.coefficients
            if index < 0
            else Coefficients(*(float(v) for v in self._members[index].item()))
        )

    def records(self, members: Sequence[int]) -> np.recarray:
        """Structured records of several members, shape (len(members),)."""
        rows = [tuple(self.member(k)) for k in members]
        return np.array(rows, dtype=COEFFICIENT_DTYPE).view(np.recarray)

    def delay_s(self, k: int | None = None) -> float:
        """Actuation delay of a clock change in member ``k``, s."""
        index = self._index(k)
        return float(self._delays_s[index]) if index >= 0 else self.content.delay_s or 0.0

    def contains(self, **work: ArrayLike) -> bool:
        """Whether all given work lies inside the validity domain.

        Args:
            work: any of tokens, attn_work, cached, n_seq, freq_mhz.

        Raises:
            BiscaleError: an unknown axis.
        """
        for axis, value in work.items():
            if axis not in WORK_AXES:
                raise BiscaleError(f"unknown work axis '{axis}'; known: {', '.join(WORK_AXES)}")
            low, high = self.content.box[axis]
            if not np.all((np.asarray(value) >= low) & (np.asarray(value) <= high)):
                return False
        return True

    def effective_freq_mhz(
        self,
        tokens: ArrayLike,
        attn_work: ArrayLike,
        cached: ArrayLike,
        n_seq: ArrayLike,
        freq_mhz: ArrayLike,
        member: int | None = None,
    ) -> Floats:
        """Highest clock <= request at which the iteration's mean power keeps the cap, MHz."""
        arrays = [
            np.asarray(a, dtype=np.float64) for a in (tokens, attn_work, cached, n_seq, freq_mhz)
        ]
        parts = np.broadcast_arrays(*arrays)
        flat = [np.ascontiguousarray(p).ravel() for p in parts]
        out = np.empty(flat[0].size)
        effective_freq_ghz(
            as_record(self.member(member)),
            *flat[:4],
            flat[4] * 1e-3,
            self.gpu.freq_min_mhz * 1e-3,
            out,
        )
        return (out * 1e3).reshape(parts[0].shape)

    def latency_s(
        self,
        tokens: ArrayLike,
        attn_work: ArrayLike,
        cached: ArrayLike,
        n_seq: ArrayLike,
        freq_mhz: ArrayLike,
        member: int | None = None,
    ) -> Floats:
        """Duration of the iteration, s."""
        freq = self.effective_freq_mhz(tokens, attn_work, cached, n_seq, freq_mhz, member)
        t, a, k, n = (np.asarray(x, dtype=np.float64) for x in (tokens, attn_work, cached, n_seq))
        return np.asarray(physics.latency_s(self.member(member), t, a, k, n, freq * 1e-3))

    def power_w(
        self,
        tokens: ArrayLike,
        attn_work: ArrayLike,
        cached: ArrayLike,
        n_seq: ArrayLike,
        freq_mhz: ArrayLike,
        member: int | None = None,
    ) -> Floats:
        """Mean power of one GPU over the iteration, W."""
        freq = self.effective_freq_mhz(tokens, attn_work, cached, n_seq, freq_mhz, member)
        t, a, k, n = (np.asarray(x, dtype=np.float64) for x in (tokens, attn_work, cached, n_seq))
        return np.asarray(physics.power_w(self.member(member), t, a, k, n, freq * 1e-3))

    def energy_j(
        self,
        tokens: ArrayLike,
        attn_work: ArrayLike,
        cached: ArrayLike,
        n_seq: ArrayLike,
        freq_mhz: ArrayLike,
        member: int | None = None,
    ) -> Floats:
        """Energy of the iteration over all GPUs of the instance, J."""
        freq = self.effective_freq_mhz(tokens, attn_work, cached, n_seq, freq_mhz, member) * 1e-3
        c = self.member(member)
        t, a, k, n = (np.asarray(x, dtype=np.float64) for x in (tokens, attn_work, cached, n_seq))
        time_s = physics.latency_s(c, t, a, k, n, freq)
        return np.asarray(c.n_gpus * physics.iteration_energy_j(c, t, a, k, n, time_s, freq))

    def optimal_freq_mhz(
        self,
        tokens: ArrayLike,
        attn_work: ArrayLike,
        cached: ArrayLike,
        n_seq: ArrayLike,
        member: int | None = None,
    ) -> Floats:
        """Clock on the GPU's grid that costs the least energy for this work, MHz."""
        clocks = self.gpu.clocks_mhz
        t, a, k, n = (
            np.asarray(x, dtype=np.float64)[..., None] for x in (tokens, attn_work, cached, n_seq)
        )
        return clocks[np.argmin(self.energy_j(t, a, k, n, clocks, member), axis=-1)]


@dataclass(frozen=True)
class _Origin:
    """Everything that a loaded model is made of: equal origins, equal models."""

    path: str
    coefficients: bytes
    ensemble: bytes | None
    layer: LayerFiles
    own_layer: LayerFiles  # of the GPU of the fit
    own: tuple[str, str]  # GPU and LLM of the fit, as JSON
    asked: tuple[str, str]  # GPU and LLM that were asked for

    def digest(self) -> str:
        """Hash of the contents, wherever the files lie."""
        parts = (
            self.coefficients,
            self.ensemble or b"",
            self.layer.content,
            self.layer.members or b"",
            self.own_layer.content,
            *map(str.encode, self.own + self.asked),
        )
        return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


def _hardware(texts: tuple[str, str]) -> Hardware:
    return Hardware(Gpu.model_validate_json(texts[0]), Llm.model_validate_json(texts[1]))


@lru_cache(maxsize=64)
def _made(origin: _Origin) -> IterationModel:
    """The model of an origin; shared by all that ask, so its arrays cannot be written."""
    path = Path(origin.path)
    content = parse_model_file(origin.coefficients, origin.path)
    own, asked = _hardware(origin.own), _hardware(origin.asked)
    given = origin.layer.layer().for_phase(content.phase, content.dtype)
    left_open = {
        name: column
        for name, column in names_in_layer(content.phase, content.dtype).items()
        if name not in content.coefficients and (name != DELAY or content.delay_s is None)
    }
    table = origin.layer.table()
    columns = {name: table[column] for name, column in left_open.items() if column in table}
    complete = content.with_layer(given, asked.gpu)
    members, delays_s = read_members(ensemble_path(path), origin.ensemble, complete, columns)
    was = origin.own_layer.layer().value("freq_profile_ghz")
    now = origin.layer.layer().value("freq_profile_ghz")
    move = plan_move(content, own, asked, was / now)
    fitted_on = ""
    if move is not None:
        complete = moved_file(complete, move, own, asked)
        members, fitted_on = move.apply(members), own.label
    members.setflags(write=False)
    delays_s.setflags(write=False)
    return IterationModel(
        complete, complete.as_tuple(), asked.gpu, asked.llm, members, delays_s, fitted_on,
        origin.digest(),
    )  # fmt: skip


_warned: set[tuple[str, str, str]] = set()


def _warn_once(model: IterationModel) -> None:
    """Say once per model and hardware that the numbers are not measured on it."""
    here = Hardware(model.gpu, model.llm).label
    key = (model.name, model.fitted_on, here)
    if model.fitted_on and key not in _warned:
        _warned.add(key)
        warnings.warn(
            f"model '{model.name}' was fitted on {model.fitted_on}; on {here} its times are scaled "
            "by counted work and data-sheet rates and its energies are those of the nearest fitted "
            "GPU: for better ones use `biscale models build`, or `biscale fit --profile` with "
            "measurements",
            BiscaleWarning,
            stacklevel=3,
        )


@lru_cache(maxsize=64)
def _named_hardware(content: bytes, where: str) -> tuple[str, str]:
    file = parse_model_file(content, where)
    return file.gpu, file.llm


def fitted_hardware(path: Path) -> Hardware:
    """GPU and LLM that a coefficient file names; their own files may lie beside it."""
    gpu, llm = _named_hardware(read_bytes(path), str(path))
    return Hardware(load_gpu(gpu, path.parent), load_llm(llm, path.parent))


def instance_hardware(instance: InstanceSpec) -> Hardware:
    """GPU and LLM of an instance: those it gives, else those of its fitted model.

    Raises:
        BiscaleError: an unknown GPU, LLM or model.
    """
    own = fitted_hardware(any_file(instance.family))
    return Hardware(
        load_gpu(instance.gpu) if instance.gpu else own.gpu,
        load_llm(instance.llm) if instance.llm else own.llm,
    )


def instance_model(phase: str, instance: InstanceSpec) -> IterationModel:
    """The fitted model of one phase of an instance, on the instance's GPU and with its LLM."""
    s = instance
    return load_model(phase, s.tp, s.dtype, s.family, s.gpu, s.llm, s.ep)


def _layer_of(own_gpu: str, beside: Path, asked_gpu: str | None) -> LayerFiles:
    """The layer of the GPU that was asked for; where nothing was fitted for it, of the file's own.

    Raises:
        BiscaleError: neither has one.
    """
    path = layer_path(asked_gpu) if asked_gpu else None
    path = path or layer_path(own_gpu, beside) or layer_path(DEFAULT_GPU)
    if path is None:
        raise BiscaleError(f"no fitted layer of GPU '{asked_gpu or own_gpu}' was found")
    return layer_files(path)


def read_model(
    phase: str,
    tp: int = 4,
    dtype: str = "bf16",
    name: str = DEFAULT_NAME,
    gpu: str | None = None,
    llm: str | None = None,
    ep: int = 1,
) -> IterationModel:
    """As :func:`load_model`, without a word about a foreign GPU or LLM."""
    if phase not in ("prefill", "decode"):
        raise BiscaleError(f"unknown phase '{phase}': choose prefill or decode")
    if dtype not in DTYPES:
        raise BiscaleError(f"unknown dtype '{dtype}': choose {', '.join(DTYPES)}")
    path = find_file(name, phase, dtype, tp, ep)
    if not path.is_file():
        raise BiscaleError(f"model file {path} does not exist")
    content = read_bytes(path)
    named = _named_hardware(content, str(path))
    own = Hardware(load_gpu(named[0], path.parent), load_llm(named[1], path.parent))
    own_layer = _layer_of(named[0], path.parent, None)
    asked = Hardware(load_gpu(gpu) if gpu else own.gpu, load_llm(llm) if llm else own.llm)
    ensemble = ensemble_path(path)
    origin = _Origin(
        str(path.resolve()),
        content,
        read_bytes(ensemble) if ensemble.is_file() else None,
        _layer_of(named[0], path.parent, gpu) if gpu else own_layer,
        own_layer,
        own.as_json(),
        asked.as_json(),
    )
    model = _made(origin)
    if (model.phase, model.tp, model.dtype, model.ep) != (phase, tp, dtype, ep):
        have = f"{model.phase}, TP {model.tp}, {model.dtype}, EP {model.ep}"
        wanted = f"{phase}, TP {tp}, {dtype}, EP {ep}"
        raise BiscaleError(f"{path} describes {have}, but {wanted} was asked for")
    return model


def load_model(
    phase: str,
    tp: int = 4,
    dtype: str = "bf16",
    name: str = DEFAULT_NAME,
    gpu: str | None = None,
    llm: str | None = None,
    ep: int = 1,
) -> IterationModel:
    """Load the fitted model of one configuration.

    Parsed once per content of the files; a changed file is read anew, whatever its time stamp.

    Args:
        phase: ``prefill`` or ``decode``.
        tp: GPUs per instance.
        dtype: ``bf16``, ``fp8`` or ``mxfp4``.
        name: a shipped family (``h100-sxm/llama-3.3-70b``), a folder of coefficient files, or one
            such file.
        gpu: another GPU than that of the fit: name or YAML file (see
            :mod:`biscale_env.models.transfer` for what follows it; warned about once).
        llm: another LLM than that of the fit, likewise.
        ep: groups that the experts are spread over.

    Raises:
        BiscaleError: unknown phase, dtype, family, configuration, GPU or LLM, or a file that is
            about something else.
    """
    model = read_model(phase, tp, dtype, name, gpu, llm, ep)
    _warn_once(model)
    return model
