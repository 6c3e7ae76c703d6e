"""`biscale fit`: everything that is shipped, from evidence and kernel tables; the same bytes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from biscale_env.config import configs_dir
from biscale_env.jobs.workers import Workers
from biscale_env.models.fit.gpu_evidence import known_evidence, load_gpu_evidence
from biscale_env.models.fit.gpu_files import (
    FittedGpu,
    Progress,
    counted,
    fit_gpu,
    fitted_dir,
    layer_texts,
)
from biscale_env.models.fit.gpu_fit import HostTime
from biscale_env.models.fit.host_fit import HostFit, MeasuredLlm, fit_energy_factor
from biscale_env.models.fit.kernel_profiles import KernelProfile, shipped_profiles
from biscale_env.models.fit.llm_files import Source, fit_tables, on_gpu
from biscale_env.models.fit.profile_table import sha256


def measured_by_llm(fitted: FittedGpu) -> dict[str, MeasuredLlm]:
    """What measured servers say per LLM.

    Host time is the mean over its servers; the spread is that of all servers.
    """
    found: dict[str, dict[str, HostTime]] = {}
    for s in fitted.servers:
        label = s.group.label
        found.setdefault(s.group.llm, {})[label] = fitted.host.by_server[label]
    made = {}
    for llm, hosts in found.items():
        mean = np.mean([(h.host0_s, h.host_s_per_seq) for h in hosts.values()], axis=0)
        host = HostFit(hosts, HostTime(*map(float, mean)), fitted.host.spread)
        servers = [s for s in fitted.servers if s.group.llm == llm]
        factor, spread = fit_energy_factor(fitted.ev, fitted.gpu, fitted.values, servers, hosts)
        made[llm] = MeasuredLlm(host, factor, spread)
    return made


def profile_files(profile: KernelProfile, measured: dict[str, MeasuredLlm]) -> dict[str, str]:
    """Files of one LLM on one GPU from its shipped kernel table."""
    source = Source(profile.source, profile.path.name, sha256(profile.path))
    on = on_gpu(profile.gpu, measured)
    return fit_tables(profile.tables(), profile.llm, on, source, profile.family)


def fit_shipped(
    gpu: str | None = None, workers: Workers | None = None, progress: Progress | None = None
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Folder and files of every GPU's layer, then of its LLMs.

    A layer has to be written before what follows it is asked for: its LLMs' files refer to it.

    Args:
        gpu: one GPU alone; None for all that there is evidence about.
        workers: where members of ensembles are fitted; None: in this process.
        progress: called with (done, all) after each member of all GPUs.
    """
    evidence = [load_gpu_evidence(name) for name in (known_evidence() if gpu is None else [gpu])]
    tell = counted(progress, sum(ev.n_members for ev in evidence))
    for ev in evidence:
        name, fitted = ev.gpu, fit_gpu(ev, workers=workers, progress=tell)
        yield fitted_dir(), layer_texts(fitted)
        for profile in shipped_profiles(name):
            yield (
                configs_dir() / "models" / profile.gpu / profile.llm.name,
                profile_files(profile, measured_by_llm(fitted)),
            )
