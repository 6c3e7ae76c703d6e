"""Small clusters and workloads for the cluster tests."""

import numpy as np

from biscale_env.config.cluster_layout import InstanceGroup, Placement
from biscale_env.envs.cluster.cluster_settings import ClusterPlant, ClusterSettings
from biscale_env.traces import Trace

MAX_MHZ = 1980.0


def placement(prefill=(4,), decode=(4,), freq_mhz=MAX_MHZ, name="test"):
    """One instance per entry, with that TP; weights in proportion to the TP."""
    groups = [InstanceGroup(phase="prefill", tp=tp, freq_mhz=freq_mhz, weight=tp) for tp in prefill]
    groups += [InstanceGroup(phase="decode", tp=tp, freq_mhz=freq_mhz, weight=tp) for tp in decode]
    return Placement(name=name, groups=tuple(groups))


def colocated(tps=(4,), freq_mhz=MAX_MHZ):
    groups = tuple(
        InstanceGroup(phase="colocated", tp=tp, freq_mhz=freq_mhz, weight=tp) for tp in tps
    )
    return Placement(name="colocated", groups=groups)


def plant(**values):
    return ClusterPlant(ClusterSettings.of(**{"actuation_delay_s": 0.0, **values}))


def trace(arrival_s, prompt, output, duration_s=0.0):
    n = len(arrival_s)
    return Trace(
        "made",
        np.asarray(arrival_s, dtype=float),
        np.broadcast_to(np.asarray(prompt, dtype=np.int32), n).copy(),
        np.broadcast_to(np.asarray(output, dtype=np.int32), n).copy(),
        "made for a test",
        duration_s=duration_s,
    )


def random_trace(n=400, rate_rps=20.0, seed=0, prompt_max=3000, output_max=200):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1.0 / rate_rps, n))
    return trace(times, rng.integers(1, prompt_max, n), rng.integers(1, output_max, n))


def idle_w(model, freq_mhz):
    """Idle power of an instance, from the coefficients."""
    c, f = model.coefficients, freq_mhz / 1e3
    volts = 1 + c.v_slope_per_ghz * 0.5 * (
        (f - c.v_knee_ghz) + np.sqrt((f - c.v_knee_ghz) ** 2 + 0.05**2)
    )
    return c.n_gpus * (c.p_static_w + c.p_clock_w_per_ghz * f * volts**2)
