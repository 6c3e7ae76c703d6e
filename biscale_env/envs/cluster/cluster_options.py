"""Constructor options of the cluster environments, resolved into a plant, a source of workloads and
a set of placements.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from biscale_env.config.cluster_layout import InstanceGroup, Placement
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_settings import ClusterPlant, ClusterSettings, check_gpus
from biscale_env.envs.workloads import WorkloadSource, generated, trace_windows
from biscale_env.models import instance_hardware, instance_model
from biscale_env.traces import Trace, load_named

DEFAULT_PROFILE = "gamma-sharegpt-like"
DEFAULT_RATE_RPS = 30.0  # about half of what 16 GPUs serve of this workload at max clock
TPS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class ClusterOptions:
    """A cluster's plant and its workloads."""

    plant: ClusterPlant
    source: WorkloadSource
    n_workloads: int

    def choose(self, rng: np.random.Generator, fixed: Mapping[str, Any] | None) -> int:
        """Workload of the next episode, from the generator unless fixed."""
        fixed = fixed or {}
        unknown = set(fixed) - {"workload"}
        if unknown:
            raise BiscaleError(f"unknown reset option '{min(unknown)}'; known: workload")
        workload = int(rng.integers(self.n_workloads))
        chosen = int(fixed.get("workload", workload))
        if chosen < 0:
            raise BiscaleError(f"reset option 'workload' must not be negative, got {chosen}")
        return chosen


def make_cluster_options(
    episode_s: float,
    trace: Trace | str | Path | None = None,
    profile: str = DEFAULT_PROFILE,
    rate_rps: float = DEFAULT_RATE_RPS,
    workload_seed: int = 0,
    n_workloads: int = 64,
    **settings: Any,
) -> ClusterOptions:
    """Resolve options.

    Args:
        episode_s: length of an episode, s.
        trace: trace, name or path; episodes are random windows of it, brought to the rate.
        profile: generator profile, used without a trace.
        rate_rps: mean request rate.
        workload_seed: root of the workloads.
        n_workloads: how many different workloads the episodes are drawn from.
        **settings: fields of :class:`biscale_env.envs.cluster.cluster_settings.ClusterSettings`.

    Raises:
        BiscaleError: an unknown option or an impossible value.
    """
    if n_workloads < 1:
        raise BiscaleError(f"n_workloads must be at least 1, got {n_workloads}")
    plant = ClusterPlant(ClusterSettings.of(**settings))
    loaded = load_named(str(trace)) if isinstance(trace, str | Path) else trace
    if loaded is not None and loaded.duration_s < episode_s:
        raise BiscaleError(
            f"{loaded.name} lasts {loaded.duration_s:g} s, but an episode needs {episode_s:g} s: "
            "use a longer trace, fewer windows or shorter ones"
        )
    make = trace_windows(loaded) if loaded is not None else generated(profile)
    return ClusterOptions(
        plant, WorkloadSource(make, rate_rps, episode_s, workload_seed), n_workloads
    )


def fitting_tps(settings: ClusterSettings, phase: str) -> list[int]:
    """TP degrees with a fitted model whose weights leave room for KV.

    Raises:
        BiscaleError: an unknown GPU, LLM or model.
    """
    instance_hardware(settings.instance("prefill", TPS[0]))
    found = []
    for tp in TPS:
        try:
            kind = "prefill" if phase == "prefill" else "decode"
            model = instance_model(kind, settings.instance(kind, tp))
        except BiscaleError:
            continue
        if model.kv_capacity_tokens > 0 and tp <= settings.gpus:
            found.append(tp)
    return found


def enumerate_placements(
    settings: ClusterSettings, freqs_mhz: Sequence[float] | None = None
) -> tuple[Placement, ...]:
    """Every placement with one TP and one base clock per phase that fits the GPUs.

    Args:
        settings: the cluster.
        freqs_mhz: base clocks; None: every second level of the GPU, from the lowest.

    Returns:
        Placements in a fixed order.

    Raises:
        BiscaleError: no TP divides the GPUs, or nothing fits.
    """
    tps = {phase: fitting_tps(settings, phase) for phase in ("prefill", "decode")}
    check_gpus(settings.gpus, tuple(sorted({tp for found in tps.values() for tp in found})))
    if freqs_mhz is None:
        hardware = instance_hardware(settings.instance("prefill", tps["prefill"][0]))
        freqs_mhz = hardware.gpu.control_levels_mhz[::2]
    made: list[Any] = []
    for tp_p, tp_d in product(tps["prefill"], tps["decode"]):
        for n_p, n_d in product(
            range(1, settings.gpus // tp_p + 1), range(1, settings.gpus // tp_d + 1)
        ):
            if n_p * tp_p + n_d * tp_d > settings.gpus:
                continue
            for f_p, f_d in product(freqs_mhz, freqs_mhz):
                groups = (
                    InstanceGroup(phase="prefill", tp=tp_p, count=n_p, freq_mhz=f_p),
                    InstanceGroup(phase="decode", tp=tp_d, count=n_d, freq_mhz=f_d),
                )
                made.append(
                    Placement(name=f"choice-{len(made)}", groups=groups, source="enumerated")
                )
    if not made:
        raise BiscaleError(
            f"no prefill and decode instance fit together on {settings.gpus} GPUs: TP degrees are {tps['prefill']} and {tps['decode']}"
        )
    return tuple(made)
