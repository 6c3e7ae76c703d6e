"""Screens of the cluster: windows of the coarse loop, intervals of many agents."""

import numpy as np

from biscale_env.envs.cluster.engine import Cluster
from biscale_env.envs.cluster.whole_run import Window
from biscale_env.render.screen import Screen
from biscale_env.render.strips import MISSES, Strip


def windows_screen(mode: str, gpus: int, span_s: float) -> Screen:
    """A screen of whole windows: load, power, GPUs per phase.

    Args:
        mode: a render mode.
        gpus: of the cluster.
        span_s: time shown, s.
    """
    strips = (
        Strip("rate_rps", "arrivals, requests/s"),
        Strip("power_kw", "power of all GPUs, kW", digits=1),
        Strip("prefill_gpus", "GPUs of prefill instances", 0.0, float(gpus)),
        Strip("decode_gpus", "GPUs of decode instances", 0.0, float(gpus), 0.0),
    )
    return Screen(mode, f"cluster of {gpus} GPUs", strips, span_s)


def show_window(screen: Screen, window: Window, end_s: float, missed: int) -> None:
    """Take in a window that ended at a time, and how many of its requests missed the SLO."""
    values = {
        "rate_rps": window.arrived / window.duration_s,
        "power_kw": window.energy.total_j / window.duration_s / 1e3,
        "prefill_gpus": float(window.placement.gpus_of("prefill")),
        "decode_gpus": float(window.placement.gpus_of("decode")),
        MISSES: float(missed),
        "finished": float(len(window.finished)),
    }
    screen.add(end_s - window.duration_s, end_s, values)
    if screen.mode == "human":
        screen.show()


def agents_screen(mode: str, cluster: Cluster) -> Screen:
    """A screen of many agents: mean clock per phase, power, requests in the cluster.

    Args:
        mode: a render mode.
        cluster: gives the clocks.
    """
    low, high = 1e3 * cluster.levels_ghz[0], 1e3 * cluster.levels_ghz[-1]
    strips = (
        Strip("prefill_mhz", "mean clock of prefill instances, MHz", low, high),
        Strip("decode_mhz", "mean clock of decode instances, MHz", low, high),
        Strip("power_kw", "power of all instances, kW", digits=1),
        Strip("in_flight", "requests in the cluster", bound=0.0),
    )
    return Screen(mode, f"{cluster.placement.name}, an agent per instance", strips)


def show_interval(
    screen: Screen, cluster: Cluster, interval_s: float, energy_j: float, missed: float
) -> None:
    """Take in an interval that ends now."""
    prefill, decode = cluster.prefills.states, cluster.decodes.states
    values = {
        "prefill_mhz": float(np.mean(prefill["freq_ghz"])) * 1e3,
        "decode_mhz": float(np.mean(decode["freq_ghz"])) * 1e3,
        "power_kw": energy_j / interval_s / 1e3,
        "in_flight": float(cluster.in_flight),
        MISSES: missed,
    }
    screen.add(cluster.time_s - interval_s, cluster.time_s, values)
    screen.finished = float(cluster.state[0]["finished"])
    if screen.mode == "human":
        screen.show()
