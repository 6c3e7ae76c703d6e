"""`biscale fit`: from kernel table and evidence to the committed coefficient files.

The same bytes every time.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.config import Gpu, load_gpu, load_llm
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.models.coefficient_files import (
    DELAY_COLUMN,
    Coefficient,
    ModelFile,
    dump_model_file,
    members_path,
    rounded,
    stem,
)
from biscale_env.models.ensemble import Member, fit_member, sample
from biscale_env.models.fit.evidence import (
    ENERGY_NAMES,
    SAMPLED_COEFFICIENTS,
    Evidence,
    evidence_path,
    load_evidence,
    profile_path,
)
from biscale_env.models.fit.latency import (
    LATENCY_FIELDS,
    WORK_FIELD,
    fit_components,
    mape,
    predict_s,
    refine,
)
from biscale_env.models.fit.profile_table import ProfileTable, read_profile, sha256
from biscale_env.models.geometry import counted_work
from biscale_env.models.physics import Coefficients

Floats = NDArray[np.float64]
# how far (in the logarithm) the joint fit may pull a coefficient from its own kernel family, see
# fit_latency.refine
SIGMA = 0.1
MEMBER_DIGITS = 5
HOST_FIELDS = ("host0_s", "host_s_per_seq")
SAMPLED_FIELDS = (*SAMPLED_COEFFICIENTS, *HOST_FIELDS, *ENERGY_NAMES)
GEOMETRY_FIELDS = (
    "n_gpus",
    "flops_per_token",
    "flops_per_attn",
    "weight_bytes",
    "bytes_per_token",
    "kv_bytes_per_token",
    "link_bytes_per_token",
)
ZERO = Coefficients(*[0.0] * len(Coefficients._fields))


@dataclass(frozen=True)
class KernelFit:
    """Latency coefficients of one configuration and how well they do."""

    table: ProfileTable
    coefficients: Coefficients
    train_mape: float
    held_out_mape: float
    held_out_max: float


def tables(ev: Evidence) -> list[ProfileTable]:
    """The kernel tables of the configurations that the evidence lists.

    Prefill is cut at its token limit.
    """
    limits = {(c.dtype, c.tp): c.max_prefill_tokens for c in ev.configurations}
    out = []
    for table in read_profile(profile_path(ev)):
        if (table.dtype, table.tp) not in limits:
            continue
        rows = table.rows
        if table.phase == "prefill":
            rows = rows[table.work.tokens <= limits[(table.dtype, table.tp)]].reset_index(drop=True)
        out.append(ProfileTable(table.phase, table.tp, table.dtype, rows))
    return out


def fit_kernels(table: ProfileTable, ev: Evidence, gpu: Gpu) -> KernelFit:
    """Fit the latency coefficients of one configuration to its kernel table; no host time."""
    held_out = table.held_out()
    sample = {name: ev.sample[name].nominal for name in SAMPLED_COEFFICIENTS}
    start = ZERO._replace(
        **sample,
        **counted_work(load_llm(ev.llm), table.tp, table.dtype),
        p_cap_w=gpu.power_cap_w,
        **fit_components(table, ~held_out),
    )
    clock = np.full(len(table.rows), start.freq_profile_ghz)
    fields = [*LATENCY_FIELDS, WORK_FIELD[table.phase]]
    c = refine(start, fields, table, ~held_out, clock, SIGMA)
    predicted, measured = predict_s(c, table, start.freq_profile_ghz), table.column("latency_s")
    errors = np.abs(predicted / measured - 1.0)[held_out]
    train = mape(predicted[~held_out], measured[~held_out])
    return KernelFit(table, c, train, float(errors.mean()), float(errors.max()))


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


def _kernel_source(ev: Evidence, dtype: str) -> tuple[str, str]:
    if dtype == "fp8":
        return (
            "derived",
            f"fitted to {ev.profile_source}; most fp8 points are the package's estimates, not "
            "measurements",
        )
    return "measured", f"fitted to {ev.profile_source}"


def _provenance(ev: Evidence, phase: str, dtype: str) -> dict[str, tuple[str, str]]:
    """Provenance and source of every coefficient."""
    out: dict[str, tuple[str, str]] = {
        "p_cap_w": ("measured", "board power limit of the H100 SXM (NVIDIA datasheet)")
    }
    out |= dict.fromkeys(
        GEOMETRY_FIELDS,
        ("derived", f"counted from the shape of {ev.llm} and the tensor parallel degree"),
    )
    kernels = _kernel_source(ev, dtype)
    out |= dict.fromkeys((*LATENCY_FIELDS, *WORK_FIELD.values()), kernels)
    other = "decode" if phase == "prefill" else "prefill"
    out[WORK_FIELD[other]] = (kernels[0], f"{kernels[1]} ({other} table of the same configuration)")
    out |= {n: (ev.sample[n].provenance, ev.sample[n].source) for n in SAMPLED_COEFFICIENTS}
    host = ev.sample[f"{phase}_host_s"]
    if phase == "decode":
        s = ev.serving
        per_seq = (
            f"measured median token intervals minus kernels, at {s.dtype} TP {s.tp}: {s.source}"
        )
        out |= dict.fromkeys(HOST_FIELDS, ("derived", per_seq))
    else:
        out |= {
            "host0_s": (host.provenance, host.source),
            "host_s_per_seq": ("assumed", "contained in host0_s"),
        }
    fitted = (
        f"energy fit to {ev.serving.source}, GEMMs at the power cap, idle power and frequency shape"
    )
    out |= {n: ("derived", f"{fitted}; {ev.energy[n].source}") for n in ENERGY_NAMES}
    return out


def _fit_record(ev: Evidence, fit: KernelFit) -> dict[str, object]:
    points = len(fit.table.rows)
    held_out = int(fit.table.held_out().sum())
    return {
        "profile": ev.profile,
        "profile_sha256": sha256(profile_path(ev)),
        "evidence": f"{ev.name}.yaml",
        "evidence_sha256": sha256(evidence_path(ev.name)),
        "split": "rows sorted by work, three of every ten held out",
        "train_points": points - held_out,
        "held_out_points": held_out,
        "train_mape": rounded(fit.train_mape, 4),
        "held_out_mape": rounded(fit.held_out_mape, 4),
        "held_out_max_error": rounded(fit.held_out_max, 4),
        "compared": "kernel sums at freq_profile_ghz, host time left out",
    }


def model_file(ev: Evidence, fit: KernelFit, nominal: Member, gpu: Gpu) -> ModelFile:
    """Content of the coefficient file of one configuration."""
    t = fit.table
    c = nominal.coefficients[(t.phase, t.dtype, t.tp)]
    provenance = _provenance(ev, t.phase, t.dtype)
    coefficients = {
        name: Coefficient(
            value=rounded(value),
            provenance=provenance[name][0],  # type: ignore[arg-type]
            source=provenance[name][1],
        )
        for name, value in zip(Coefficients._fields, c, strict=True)
    }
    return ModelFile(
        name=ev.name,
        phase=t.phase,
        dtype=t.dtype,
        tp=t.tp,
        gpu=ev.gpu,
        llm=ev.llm,
        coefficients=coefficients,
        box=domain_of(t, gpu.freq_min_mhz, gpu.freq_max_mhz),
        delay_s=nominal.sample["delay_s"],
        fit=_fit_record(ev, fit),
    )


def members_csv(
    ev: Evidence, members: list[Member], counts: dict[str, int], key: tuple[str, str, int]
) -> str:
    """Text of the ensemble of one configuration.

    Member k is the same sample in every configuration.
    """
    rows = []
    for member in members:
        c = member.coefficients[key]
        rows.append(
            {DELAY_COLUMN: member.sample["delay_s"]}
            | {name: getattr(c, name) for name in SAMPLED_FIELDS}
        )
    table = pd.DataFrame(rows).map(lambda v: rounded(v, MEMBER_DIGITS))
    tally = ", ".join(f"{k} {v}" for k, v in sorted(counts.items()))
    head = (
        f"# Members that agree with all evidence of {ev.name} (seed {ev.seed}); "
        f"rejections: {tally}\n"
    )
    return head + table.to_csv(index=False, lineterminator="\n")


def fit_family(name: str) -> dict[str, str]:
    """Fit every configuration of a shipped model family.

    Returns:
        File name to text, ready to be written into one folder.
    """
    ev = load_evidence(name)
    gpu = load_gpu(ev.gpu)
    fits = {(t.phase, t.dtype, t.tp): fit_kernels(t, ev, gpu) for t in tables(ev)}
    kernels: dict[tuple[str, str, int], Coefficients] = {
        key: fit.coefficients for key, fit in fits.items()
    }
    nominal = fit_member(kernels, ev.nominal_sample, ev, gpu.freq_min_mhz * 1e-3)
    members, counts = sample(kernels, ev, gpu.clocks_mhz)
    files: dict[str, str] = {}
    for key, fit in fits.items():
        path = Path(f"{stem(*key)}.yaml")
        files[path.name] = dump_model_file(model_file(ev, fit, nominal, gpu))
        files[members_path(path).name] = members_csv(ev, members, counts, key)
    return files


def write_family(files: dict[str, str], folder: Path) -> None:
    """Write fitted files into a folder.

    Raises:
        BiscaleError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_whole(folder / name, text)
    except OSError as error:
        raise BiscaleError(f"cannot write into {folder}: {error.strerror}") from None


def stale_files(files: dict[str, str], folder: Path) -> list[str]:
    """Names of fitted files that differ from those in a folder or are missing there."""
    return [
        n
        for n, text in files.items()
        if not (folder / n).is_file() or (folder / n).read_text(encoding="utf-8") != text
    ]
