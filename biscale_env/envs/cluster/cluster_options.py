"""Constructor options of the cluster environments.

They are resolved into a plant, a source of workloads and a set of placements.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np

from biscale_env.config import Slo
from biscale_env.config.cluster_layout import InstanceGroup, Placement
from biscale_env.config.loader import validate
from biscale_env.core.errors import BiscaleError, OptionError
from biscale_env.envs.cluster.cluster_settings import ClusterPlant, ClusterSettings, check_gpus
from biscale_env.envs.cluster.instance_capacities import InstanceCapacities
from biscale_env.envs.loads.prefix_hits import with_cache
from biscale_env.envs.loads.workloads import WorkloadSource, generated, trace_windows
from biscale_env.envs.options import (
    WORKLOAD_KEYS,
    WorkloadOptions,
    real,
    reset_options,
    unknown_keyword,
    whole,
)
from biscale_env.envs.plant import PlantSettings
from biscale_env.models import instance_hardware, instance_model
from biscale_env.traces import Trace

DEFAULT_PROFILE: Final = "gamma-sharegpt-like"
DEFAULT_RATE_RPS: Final = 30.0  # about half of what 16 GPUs serve of this workload at max clock
VIOLATION_WEIGHT: Final[float] = PlantSettings.model_fields["violation_weight"].default
TPS: Final = (1, 2, 4, 8, 16)
OWN_OPTIONS: Final = (
    "windows",
    "window_s",
    "freqs_mhz",
    "capacities_rps",
    "placement",
    "interval_s",
    "violation_weight",
)
ELSEWHERE: Final = {  # options of the single-instance environments that mean nothing here
    "tp": "the placement gives each instance its TP",
    "max_seqs": "use prefill_max_seqs or decode_max_seqs",
    "min_decision_interval_s": "a decision stands for a whole window or interval",
    "drain": "requests in flight at the end of an episode are not judged",
    "discrete": "actions have one form here",
}


@dataclass(frozen=True)
class ClusterOptions:
    """A cluster's plant and its workloads.

    Attributes:
        plant: the cluster without its placement.
        source: makes the workloads.
        n_workloads: how many different ones the episodes are drawn from.
        violation_weight: reward lost per request that misses the SLO, in reference energies.
        capacities: what instances serve of this workload.
    """

    plant: ClusterPlant
    source: WorkloadSource
    n_workloads: int
    violation_weight: float
    capacities: InstanceCapacities

    def choose(self, rng: np.random.Generator, fixed: Mapping[str, Any] | None) -> int:
        """Workload of the next episode, from the generator unless fixed.

        Args:
            rng: gives the next number, whether it is used or not.
            fixed: reset options; only ``workload`` is known.

        Raises:
            BiscaleError: an unknown option, or not a whole number from 0 on.
        """
        fixed = reset_options(fixed)
        unknown = sorted(str(name) for name in set(fixed) - {"workload"})
        if unknown:
            raise BiscaleError(f"unknown reset option '{unknown[0]}'; known: workload")
        drawn = int(rng.integers(self.n_workloads))
        chosen = whole(fixed.get("workload", drawn), "reset option 'workload'")
        if chosen < 0:
            raise BiscaleError(f"reset option 'workload' must not be negative, got {chosen}")
        return chosen


def _plant(slo: str | Slo | Mapping[str, Any], options: Mapping[str, Any]) -> ClusterPlant:
    known = [*OWN_OPTIONS, *WORKLOAD_KEYS, *ClusterSettings.model_fields]
    for name in options:
        if name in ELSEWHERE:
            raise OptionError(f"unexpected keyword argument '{name}': {ELSEWHERE[name]}")
        if name not in ClusterSettings.model_fields:
            raise unknown_keyword("the cluster environment", name, known)
    given = validate(dict(slo), Slo, "slo") if isinstance(slo, Mapping) else slo
    own = given if isinstance(given, Slo) else None
    settings = ClusterSettings.of(slo=own.name if own else given, **options)
    return ClusterPlant(settings, own)


def make_cluster_options(
    episode_s: float,
    most_rps: Callable[[InstanceCapacities], float],
    *,
    trace: Trace | str | Path | None = None,
    profile: str = DEFAULT_PROFILE,
    slo: str | Slo | Mapping[str, Any] = "biscale",
    load: float | None = None,
    rate_rps: float | None = None,
    workload_seed: int = 0,
    n_workloads: int = 64,
    violation_weight: float = VIOLATION_WEIGHT,
    **settings: Any,
) -> ClusterOptions:
    """Resolve options.

    Args:
        episode_s: length of an episode, s.
        most_rps: load that the cluster serves within the SLO at best, for ``load``.
        trace: trace, name or path; episodes are random windows of it, brought to the rate. The
            name of a generator profile is the same as ``profile``.
        profile: generator profile, used without a trace.
        slo: an SLO, its name, or a mapping of its fields.
        load: mean request rate as a fraction of what the cluster serves at best.
        rate_rps: mean request rate instead of a load; the default is 30 requests/s.
        workload_seed: root of the workloads.
        n_workloads: how many different workloads the episodes are drawn from.
        violation_weight: reward lost per request that misses the SLO, in reference energies.
        **settings: fields of :class:`biscale_env.envs.cluster.cluster_settings.ClusterSettings`.

    Raises:
        BiscaleError: an unknown option or an impossible value.
    """
    if not 0 <= real(violation_weight, "violation_weight") < np.inf:
        raise BiscaleError(f"violation_weight must be a number from 0 on, got {violation_weight}")
    if not 0 < real(episode_s, "episode_s") < np.inf:
        raise BiscaleError(f"episode_s must be a positive number of seconds, got {episode_s}")
    plant = _plant(slo, settings)
    workload = WorkloadOptions(
        trace, profile, load, rate_rps, episode_s, workload_seed, n_workloads
    )
    loaded, profile = workload.loaded()
    if loaded is not None:
        loaded = with_cache(plant.settings.prefix_cache, loaded)
    if loaded is not None and loaded.duration_s < episode_s:
        raise BiscaleError(
            f"{loaded.name} lasts {loaded.duration_s:g} s, but an episode needs {episode_s:g} s: "
            "use a longer trace, fewer windows or shorter ones"
        )
    capacities = InstanceCapacities(plant, profile, loaded)
    if load is not None:
        rate_rps = load * most_rps(capacities)
        if rate_rps <= 0:
            raise BiscaleError(
                "no load at all meets the SLO on this cluster: give rate_rps instead"
            )
    make = trace_windows(loaded) if loaded is not None else generated(profile)
    rate = DEFAULT_RATE_RPS if rate_rps is None else rate_rps
    source = WorkloadSource(make, rate, episode_s, workload_seed)
    return ClusterOptions(plant, source, n_workloads, violation_weight, capacities)


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
        BiscaleError: no TP divides the GPUs, nothing fits, or a clock is none.
    """
    if freqs_mhz is not None and (np.ndim(freqs_mhz) != 1 or isinstance(freqs_mhz, str)):
        raise BiscaleError(f"freqs_mhz must be a sequence of clocks in MHz, got {freqs_mhz!r}")
    for freq_mhz in () if freqs_mhz is None else freqs_mhz:
        real(freq_mhz, "a clock of freqs_mhz")
    tps = {phase: fitting_tps(settings, phase) for phase in ("prefill", "decode")}
    check_gpus(settings.gpus, tuple(sorted({tp for found in tps.values() for tp in found})))
    if freqs_mhz is None:
        hardware = instance_hardware(settings.instance("prefill", tps["prefill"][0]))
        freqs_mhz = hardware.gpu.control_levels_mhz[::2]
    made: list[Placement] = []
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
                name = f"choice-{len(made)}"
                made.append(Placement(name=name, groups=groups, source="enumerated"))
    if not made:
        raise BiscaleError(
            f"no prefill and decode instance fit together on {settings.gpus} GPUs: TP degrees are "
            f"{tps['prefill']} and {tps['decode']}"
        )
    return tuple(made)
