"""From kernel tables to the committed folders of an LLM on a GPU."""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.config import Gpu, Llm, load_gpu
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.models.coefficient import Coefficient, Provenance, dump_fitted, rounded
from biscale_env.models.coefficient_files import OWN_FIELDS, ModelFile, stem
from biscale_env.models.ensemble_table import table_text
from biscale_env.models.fit.host_fit import HostFit, MeasuredLlm
from biscale_env.models.fit.latency import LATENCY_FIELDS, WORK_FIELD
from biscale_env.models.fit.profile_table import ProfileTable
from biscale_env.models.fit.work_fit import COMPUTE_FIELDS, WorkFit, fit_work
from biscale_env.models.gpu_layer import (
    HOST_FIELDS,
    LayerFiles,
    ensemble_path,
    layer_files,
    layer_path,
)

Floats = NDArray[np.float64]
FIT_TOLERANCE: Final = 0.02  # relative, of a fitted number made again
WORDS: Final = re.compile(r"[^\s,:\[\]{}']+")
TIMES: Final = tuple(
    n for n in (*LATENCY_FIELDS, *WORK_FIELD.values()) if n.endswith("_s") or "_s_per" in n
)
TABLE_SPREAD: Final = 0.09  # of kernel sums against engines, beside host time: see held_out
ESTIMATE_SPREAD: Final = 0.20  # more of it where all of them are estimates; assumed
FROM_TABLE: Final = (*TIMES, "expert_skew")
OWN_HOST_SPREAD: Final = 0.4  # of what servers differ by: a measured LLM's host time; assumed


@dataclass(frozen=True)
class Source:
    """Where kernel times come from.

    Attributes:
        text: citation.
        file: name of the table.
        sha256: of its content.
        provenance: of times where all kernels were measured.
    """

    text: str
    file: str
    sha256: str
    provenance: Provenance = "measured"


@dataclass(frozen=True)
class OnGpu:
    """A GPU that models are made for.

    Attributes:
        gpu: its description.
        files: its fitted layer.
        measured: what measured servers say, by LLM.
    """

    gpu: Gpu
    files: LayerFiles
    measured: Mapping[str, MeasuredLlm]


def on_gpu(gpu: str, measured: Mapping[str, MeasuredLlm] | None = None) -> OnGpu:
    """A GPU with its committed layer.

    Raises:
        BiscaleError: unknown GPU, or nothing was fitted for it.
    """
    path = layer_path(gpu)
    if path is None:
        raise BiscaleError(f"GPU '{gpu}' has no fitted layer: run `biscale fit --gpu {gpu}`")
    return OnGpu(load_gpu(gpu), layer_files(path), measured or {})


def domain_of(
    table: ProfileTable, freq_min_mhz: float, freq_max_mhz: float
) -> dict[str, tuple[float, float]]:
    """Range of work that a table covers; attention work and cached tokens from zero."""
    w = table.work
    axes = {"tokens": w.tokens, "attn_work": w.attn_work, "cached": w.cached, "n_seq": w.n_seq}
    domain = {
        name: (0.0 if name in ("attn_work", "cached") else float(v.min()), float(v.max()))
        for name, v in axes.items()
    }
    return {**domain, "freq_mhz": (freq_min_mhz, freq_max_mhz)}


def estimated_share(table: ProfileTable) -> float:
    """Share of the time of a table whose kernels were not measured, 0 to 1."""
    if "estimated_share" not in table.rows:
        return 0.0
    return float(table.column("estimated_share").mean())


def fit_tables(
    tables: Sequence[ProfileTable], llm: Llm, on: OnGpu, source: Source, family: str
) -> dict[str, str]:
    """Files of one LLM on one GPU: file name to text.

    Args:
        tables: kernel tables, both phases of every configuration.
        llm: the LLM.
        on: the GPU.
        source: of the tables.
        family: name of the model family.
    """
    layer = on.files.layer().values
    native = on.gpu.multiplies_mxfp4
    fits: dict[tuple[str, str, int, int], WorkFit] = {
        (t.phase, t.dtype, t.tp, t.ep): fit_work(t, llm, layer, native) for t in tables
    }
    files: dict[str, str] = {}
    for (phase, dtype, tp, ep), fit in fits.items():
        other = "decode" if phase == "prefill" else "prefill"
        both = fits.get((other, dtype, tp, ep))
        if both is None:
            raise BiscaleError(
                f"{source.file}: {stem(phase, dtype, tp, ep)} has no table of {other}"
            )
        extra = {WORK_FIELD[other]: getattr(both.coefficients, WORK_FIELD[other])}
        content = _content(fit, extra, llm, on, source, family)
        path = Path(f"{stem(phase, dtype, tp, ep)}.yaml")
        files[path.name] = dump_fitted(content)
        share = (estimated_share(fit.table) + estimated_share(both.table)) / 2.0
        files[ensemble_path(path).name] = _members(content, share, llm, on)
    return files


def _host_of(llm: Llm, on: OnGpu, phase: str) -> HostFit | None:
    measured = on.measured.get(llm.name)
    return measured.host if measured is not None and phase == "decode" else None


def _content(
    fit: WorkFit,
    extra: Mapping[str, float],
    llm: Llm,
    on: OnGpu,
    source: Source,
    family: str,
) -> ModelFile:
    t = fit.table
    values = {n: getattr(fit.coefficients, n) for n in OWN_FIELDS} | dict(extra)
    share = estimated_share(t)
    made = {n: _coefficient(n, values[n], source, share, llm) for n in OWN_FIELDS}
    own = on.measured.get(llm.name)
    if own is not None:
        made["energy_factor"] = Coefficient(
            value=rounded(own.energy_factor),
            provenance="derived",
            source="measured power of its servers against the GPU's layer, half trusted",
        )
    host = _host_of(llm, on, t.phase)
    if host is not None:
        text = f"measured median intervals of {', '.join(host.by_server)} minus kernels"
        for n in HOST_FIELDS:
            value = rounded(getattr(host.mean, n))
            made[n] = Coefficient(value=value, provenance="derived", source=text)
    return ModelFile(
        name=family,
        phase=t.phase,
        dtype=t.dtype,
        tp=t.tp,
        ep=t.ep,
        gpu=on.gpu.name,
        llm=llm.name,
        coefficients=made,
        box=domain_of(t, on.gpu.freq_min_mhz, on.gpu.freq_max_mhz),
        fit={
            "profile": source.file,
            "profile_sha256": source.sha256,
            "split": "rows sorted by work, three of every ten held out",
            "train_points": int((~t.held_out()).sum()),
            "held_out_points": int(t.held_out().sum()),
            "train_mape": rounded(fit.train_mape, 4),
            "held_out_mape": rounded(fit.held_out_mape, 4),
            "held_out_max_error": rounded(fit.held_out_max, 4),
            "estimated_share": rounded(share, 3),
            "compared": "kernel sums as in the table, host time left out",
        },
    )


def _coefficient(name: str, value: float, source: Source, share: float, llm: Llm) -> Coefficient:
    if name in FROM_TABLE:
        counted = source.provenance == "assumed"  # a roofline: nothing in it is measured
        kind: Provenance = source.provenance if share < 0.5 or counted else "derived"
        text = f"fitted to {source.text}"
        if share > 0.005 and not counted:
            text += f"; {share:.0%} of the time are estimates of the package"
        if name in COMPUTE_FIELDS:
            kind = kind if counted else "derived"
            text = f"{text}; brought to freq_profile_ghz from gemm_profile_ghz"
    elif name == "energy_factor":
        kind, text = "assumed", "no server of this LLM was measured on this GPU"
    elif name == "gemm0_s":
        kind, text = "derived", "number of GEMM kernels times kernel0_s of the GPU"
    else:
        kind = "derived"
        text = f"counted from the shape of {llm.name} and the parallel degrees"
    return Coefficient(value=rounded(value), provenance=kind, source=text)


def _members(content: ModelFile, share: float, llm: Llm, on: OnGpu) -> str:
    """Text of the ensemble of one configuration, with as many members as the GPU's layer.

    All kernel times of a member are off by one factor; GEMMs also by the clock that their table ran
    at, which is the GPU member's.
    """
    layer = on.files.table()
    n = len(next(iter(layer.values())))
    rng = np.random.default_rng(zlib.crc32(f"{content.name} {content.dtype} {content.tp}".encode()))
    scale = np.exp(rng.normal(0.0, np.hypot(TABLE_SPREAD, ESTIMATE_SPREAD * share), n))
    columns: dict[str, Floats] = {}
    for name in TIMES:
        value = content.coefficients[name].value
        if value > 0:
            columns[name] = value * scale
    clock = on.files.layer().value("gemm_profile_ghz")
    for name in COMPUTE_FIELDS:
        if name in columns and "gemm_profile_ghz" in layer:
            columns[name] = columns[name] * layer["gemm_profile_ghz"] / clock
    own = on.measured.get(llm.name)
    spread = on.files.layer().fit["server_power"] if own is None else own.spread
    factor = np.random.default_rng(zlib.crc32(content.name.encode())).normal(size=n)
    columns["energy_factor"] = content.coefficients["energy_factor"].value * np.exp(spread * factor)
    host = _host_of(llm, on, content.phase)
    if host is not None:
        for name in HOST_FIELDS:
            own_spread = OWN_HOST_SPREAD * getattr(host.spread, name)
            drawn = getattr(host.mean, name) + own_spread * rng.normal(size=n)
            columns[name] = np.maximum(drawn, 0.0)
    return table_text(
        f"Kernel and host times of member k of {on.gpu.name}; its other columns are the GPU's",
        columns,
    )


def write_family(files: Mapping[str, str], folder: Path) -> None:
    """Write fitted files into a folder.

    Raises:
        BiscaleError: the folder cannot be written.
    """
    try:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
    except OSError as error:
        raise BiscaleError(f"cannot write into {folder}: {error.strerror}") from None


def same_fit(one: str, other: str) -> bool:
    """Whether two texts of fitted files say the same.

    Words must be equal and numbers within ``FIT_TOLERANCE``: an optimum is found to about that on
    another processor or with another linear algebra.
    """
    if one == other:
        return True
    ours, theirs = WORDS.findall(one), WORDS.findall(other)
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_word(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        a, b = float(one), float(other)
    except ValueError:
        return False
    return math.isclose(a, b, rel_tol=FIT_TOLERANCE)


def stale_files(files: Mapping[str, str], folder: Path) -> list[str]:
    """Names of fitted files that differ from those in a folder or are missing there, or too many.

    Too many are coefficient files of configurations that nothing gives any more.
    """
    differ = [
        n
        for n, text in files.items()
        if not (folder / n).is_file() or not same_fit((folder / n).read_text("utf-8"), text)
    ]
    return differ + sorted({p.name for p in folder.glob("*-tp*")} - set(files))
