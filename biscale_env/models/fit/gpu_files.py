"""`biscale fit --gpu`: from evidence and kernel tables to the committed layer of a GPU."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from threadpoolctl import threadpool_limits

from biscale_env.config import Gpu, configs_dir, list_names, load_gpu, load_llm
from biscale_env.jobs.workers import Workers, in_order
from biscale_env.models.coefficient import Coefficient, dump_fitted, rounded
from biscale_env.models.coefficient_files import OWN_FIELDS
from biscale_env.models.ensemble_table import table_text
from biscale_env.models.fit.gpu_evidence import (
    GpuEvidence,
    ServingGroup,
    evidence_dir,
)
from biscale_env.models.fit.gpu_fit import (
    GpuFit,
    HostTime,
    Moved,
    ServerWork,
    fixed_values,
    predict_kernels,
    predict_points,
    server_work,
)
from biscale_env.models.fit.host_fit import HostFit, fit_host, sample_host
from biscale_env.models.fit.kernel_profiles import KernelProfile, profiles_dir
from biscale_env.models.fit.profile_table import sha256
from biscale_env.models.fit.work_fit import fit_work
from biscale_env.models.gpu_layer import LAYER_FIELDS, GpuLayer, ensemble_path

ROUNDS: Final = 2  # fit and host time settle to 1e-3 in two
Progress = Callable[[int, int], None]
"""Called with (done, all) after each member."""


@dataclass(frozen=True)
class FittedGpu:
    """A fitted layer with everything that it was made of.

    Attributes:
        ev: the evidence.
        gpu: the description.
        servers: measured servers that had a kernel table.
        missing: labels of those that had none.
        values: nominal fields.
        host: host times.
        members: fields of every member.
        fitted: names of fields that data bear on.
    """

    ev: GpuEvidence
    gpu: Gpu
    servers: tuple[ServerWork, ...]
    missing: tuple[str, ...]
    values: Mapping[str, float]
    host: HostFit
    members: tuple[Mapping[str, float], ...]
    fitted: tuple[str, ...]


@cache
def _work_of(
    gpu: str, llm: str, dtype: str, tp: int, ep: int, key: tuple[float, ...]
) -> dict[str, float] | None:
    """Work coefficients of decode with both attention terms; None without a table."""
    path = profiles_dir() / f"{gpu}-{llm}.csv"
    if llm not in list_names("llms") or not path.is_file():
        return None
    native = load_gpu(gpu).multiplies_mxfp4
    layer = dict(zip(LAYER_FIELDS, key, strict=True))
    tables = KernelProfile(gpu, load_llm(llm), path, "").tables()
    fits = {
        t.phase: fit_work(t, load_llm(llm), layer, native).coefficients
        for t in tables
        if (t.dtype, t.tp, t.ep) == (dtype, tp, ep)
    }
    if set(fits) != {"prefill", "decode"}:
        return None
    found = {name: getattr(fits["decode"], name) for name in OWN_FIELDS}
    return found | {"attn_prefill_s": fits["prefill"].attn_prefill_s}


def servers_of(
    ev: GpuEvidence, values: Mapping[str, float], groups: Sequence[ServingGroup]
) -> tuple[tuple[ServerWork, ...], tuple[str, ...]]:
    """Measured servers with the work of their LLMs; labels of those without a kernel table."""
    key = tuple(values[name] for name in LAYER_FIELDS)
    found, missing = [], []
    for g in groups:
        work = _work_of(ev.gpu, g.llm, g.dtype, g.tp, g.ep, key)
        if work is None:
            missing.append(g.label)
        else:
            found.append(server_work(ev, g, work, ev.serving.prompt_tokens[g.task]))
    return tuple(found), tuple(missing)


def fit_gpu(
    ev: GpuEvidence,
    n_members: int | None = None,
    without_llm: str | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> FittedGpu:
    """Fit the layer of a GPU and its ensemble.

    Args:
        ev: the evidence.
        n_members: other size of the ensemble.
        without_llm: an LLM whose servers are kept from the fit.
        workers: where members are fitted; None: in this process.
        progress: told of every member.
    """
    gpu = load_gpu(ev.gpu)
    groups = [g for g in ev.serving.groups if g.llm != without_llm]
    values = fixed_values(ev)
    kernels_only = GpuFit(ev, gpu, (), {})
    values = kernels_only.values(kernels_only.solve(values, kernels_only.unmoved()), values)
    servers, missing = servers_of(ev, values, groups)
    host = fit_host(ev, gpu, values, servers)
    fit, z = kernels_only, None
    for _ in range(ROUNDS):
        fit = GpuFit(ev, gpu, servers, host.by_server)
        z = fit.solve(fixed_values(ev), fit.unmoved(), z)
        values = fit.values(z, fixed_values(ev))
        host = fit_host(ev, gpu, values, servers)
    rng = np.random.default_rng(ev.seed)
    # all draws come first, one after the other: members do not depend on where they are fitted
    draws = [
        (fit, *_draw(fit, host, rng), z)
        for _ in range(ev.n_members if n_members is None else n_members)
    ]
    members = in_order(fit_member, draws, workers or Workers(), progress)
    return FittedGpu(
        ev, gpu, servers, missing, values | _host_fields(host.mean), host, tuple(members),
        fit.fields,
    )  # fmt: skip


def counted(progress: Progress | None, total: int) -> Progress | None:
    """Progress of several fits as that of one: every call is one member more of ``total``."""
    if progress is None:
        return None
    done = itertools.count(1)
    return lambda *_: progress(next(done), total)


def _draw(
    fit: GpuFit, host: HostFit, rng: np.random.Generator
) -> tuple[dict[str, float], Moved, HostTime]:
    """What chance decides of a member: fields that are not fitted, evidence, host time."""
    return fixed_values(fit.ev, rng), fit.moved(rng), sample_host(host, rng)


def fit_member(
    fit: GpuFit,
    fixed: Mapping[str, float],
    moved: Moved,
    host: HostTime,
    start: np.ndarray | None,
) -> dict[str, float]:
    """Fields of one member; at the top level, so that it can be sent.

    Args:
        fit: the posterior.
        fixed: fields that are not fitted.
        moved: how far the evidence is moved.
        host: host time.
        start: standardised parameters where the search starts.
    """
    with threadpool_limits(1):  # sums in the same order here as in a worker
        values = fit.values(fit.solve(fixed, moved, start), fixed)
    return values | _host_fields(host)


def _host_fields(host: HostTime) -> dict[str, float]:
    return {"decode_host0_s": host.host0_s, "decode_host_s_per_seq": host.host_s_per_seq}


def layer_of(fitted: FittedGpu) -> GpuLayer:
    """Content of the layer's file."""
    ev = fitted.ev
    what = f"posterior of kernels ({ev.kernels.source})" if ev.kernels.points else "prior"
    if fitted.servers:
        what += f", servers ({ev.serving.source})"
    made = {}
    for name in LAYER_FIELDS:
        p = ev.prior[name]
        measured = name in fitted.fitted or (name.startswith("decode_host") and fitted.servers)
        made[name] = Coefficient(
            value=rounded(fitted.values[name]),
            provenance="derived" if measured else p.provenance,
            source=f"{what} and {p.source}" if measured else p.source,
        )
    return GpuLayer(gpu=ev.gpu, coefficients=made, fit=_record(fitted))


def _record(fitted: FittedGpu) -> dict[str, object]:
    ev = fitted.ev
    out: dict[str, object] = {
        "evidence": f"{ev.gpu}.yaml",
        "evidence_sha256": sha256(evidence_dir() / f"{ev.gpu}.yaml"),
        "base": ev.base,
        "server_power": ev.noise.server_power,
        "kernels": len(ev.kernels.points),
        "servers": [s.group.label for s in fitted.servers],
        "servers_without_kernel_table": list(fitted.missing),
    }
    if ev.kernels.points:
        time, power = predict_kernels(ev.kernels.points, fitted.gpu, fitted.values)
        measured = np.array([(p.time_us * 1e-6, p.power_w) for p in ev.kernels.points]).T
        out["kernel_time_mape"] = rounded(float(np.abs(time / measured[0] - 1.0).mean()), 3)
        out["kernel_power_mape"] = rounded(float(np.abs(power / measured[1] - 1.0).mean()), 3)
    if fitted.servers:
        errors = np.array(server_errors(fitted))
        out["server_itl_mape"] = rounded(float(np.abs(errors[:, 0]).mean()), 3)
        out["server_power_mape"] = rounded(float(np.abs(errors[:, 1]).mean()), 3)
    return out


def server_errors(fitted: FittedGpu) -> list[tuple[float, float]]:
    """Relative errors of median interval and power at every fitted serving point."""
    out = []
    for s in fitted.servers:
        host = fitted.host.by_server[s.group.label]
        found = predict_points(fitted.ev, fitted.gpu, fitted.values, s, host)
        out += [
            (q.itl_p50_s / p.itl_p50_s - 1.0, q.power_w / p.power_w - 1.0)
            for p, q in zip(s.group.points, found, strict=True)
        ]
    return out


def members_csv(fitted: FittedGpu) -> str:
    """Text of the layer's ensemble."""
    columns = {n: [m[n] for m in fitted.members] for n in LAYER_FIELDS}
    comment = (
        f"Randomised maxima of the posterior of {fitted.ev.gpu} (seed {fitted.ev.seed}): every "
        "member is a fit to evidence and priors moved by their noise"
    )
    return table_text(comment, {n: v for n, v in columns.items() if len(set(v)) > 1})


def layer_texts(fitted: FittedGpu) -> dict[str, str]:
    """File name to text, ready to be written into ``configs/gpus/fitted``."""
    name = f"{fitted.ev.gpu}.yaml"
    return {
        name: dump_fitted(layer_of(fitted)),
        ensemble_path(Path(name)).name: members_csv(fitted),
    }


def fitted_dir() -> Path:
    """Folder of the committed layers."""
    return configs_dir() / "gpus" / "fitted"
