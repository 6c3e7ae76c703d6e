"""What the fit says of what it was not shown: one LLM left out at a time, one clock at a time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml
from numpy.typing import NDArray

from biscale_env.config import configs_dir, load_gpu
from biscale_env.config.loader import read_yaml
from biscale_env.core.files import write_whole
from biscale_env.jobs.workers import Workers
from biscale_env.models.fit.gpu_evidence import GpuEvidence, evidence_dir, load_gpu_evidence
from biscale_env.models.fit.gpu_files import FittedGpu, Progress, counted, fit_gpu, servers_of
from biscale_env.models.fit.gpu_fit import (
    GpuFit,
    HostTime,
    ServerWork,
    fixed_values,
    predict_kernels,
    predict_points,
)
from biscale_env.models.fit.llm_files import TABLE_SPREAD, TIMES
from biscale_env.models.fit.profile_table import sha256
from biscale_env.models.fit.server_model import ServerPrediction

Floats = NDArray[np.float64]
BAND: Final = (5.0, 95.0)  # percentiles of the members


@dataclass(frozen=True)
class HeldOutServer:
    """One measured server of an LLM that the fit was not shown.

    Attributes:
        server: the server.
        itl_s: predicted median intervals, s, shape (points,).
        power_w: predicted power per GPU, W, shape (points,).
        itl_members_s: of every member, s, shape (members, points).
        power_members_w: of every member, W, shape (members, points).
    """

    server: ServerWork
    itl_s: Floats
    power_w: Floats
    itl_members_s: Floats
    power_members_w: Floats

    @property
    def measured_itl_s(self) -> Floats:
        """Measured median intervals, s."""
        return np.array([p.itl_p50_s for p in self.server.group.points])

    @property
    def measured_power_w(self) -> Floats:
        """Measured power per GPU, W."""
        return np.array([p.power_w for p in self.server.group.points])

    @property
    def inside(self) -> tuple[int, int]:
        """Points inside the band of the members: (intervals, powers)."""
        return (
            _inside(self.measured_itl_s, self.itl_members_s),
            _inside(self.measured_power_w, self.power_members_w),
        )

    def record(self) -> dict[str, Any]:
        """Plain figures for the layer's file."""
        itl, power = (
            float(np.abs(found / measured - 1.0).mean())
            for found, measured in (
                (self.itl_s, self.measured_itl_s),
                (self.power_w, self.measured_power_w),
            )
        )
        return {
            "server": self.server.group.label,
            "points": len(self.itl_s),
            "itl_mape": round(itl, 4),
            "power_mape": round(power, 4),
            "power_bias": round(float((self.power_w / self.measured_power_w - 1.0).mean()), 4),
            "itl_inside_5_95": self.inside[0],
            "power_inside_5_95": self.inside[1],
        }


def _inside(measured: Floats, members: Floats) -> int:
    low, high = np.percentile(members, BAND, axis=0)
    return int(((measured >= low) & (measured <= high)).sum())


def leave_one_llm_out(
    ev: GpuEvidence,
    n_members: int,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Iterator[HeldOutServer]:
    """Fit without each measured LLM in turn and predict its servers as those of a new LLM."""
    llms = sorted({g.llm for g in ev.serving.groups})
    tell = counted(progress, n_members * len(llms))
    for llm in llms:
        fitted = fit_gpu(ev, n_members, llm, workers, tell)
        groups = [g for g in ev.serving.groups if g.llm == llm]
        for server in servers_of(ev, fitted.values, groups)[0]:
            yield _predicted(fitted, server)


def _predicted(fitted: FittedGpu, server: ServerWork) -> HeldOutServer:
    rng = np.random.default_rng(fitted.ev.seed)
    nominal = predict_points(fitted.ev, fitted.gpu, fitted.values, server, fitted.host.mean)
    members = [_of_member(fitted, m, server, rng) for m in fitted.members]
    return HeldOutServer(
        server,
        np.array([q.itl_p50_s for q in nominal]),
        np.array([q.power_w for q in nominal]),
        np.array([[q.itl_p50_s for q in m] for m in members]),
        np.array([[q.power_w for q in m] for m in members]),
    )


def _of_member(
    fitted: FittedGpu, member: Mapping[str, float], server: ServerWork, rng: np.random.Generator
) -> list[ServerPrediction]:
    """Prediction of one member, its kernels and its energy off as those of a new LLM may be."""
    scale = float(np.exp(rng.normal(0.0, TABLE_SPREAD)))
    factor = float(np.exp(rng.normal(0.0, fitted.ev.noise.server_power)))
    work = {n: v * scale if n in TIMES else v for n, v in server.work.items()}
    off = ServerWork(server.group, work, server.prompt_tokens, server.mixtures)
    host = HostTime(member["decode_host0_s"], member["decode_host_s_per_seq"])
    return predict_points(fitted.ev, fitted.gpu, member, off, host, factor)


@dataclass(frozen=True)
class HeldOutClock:
    """Kernels at one requested clock that the fit was not shown.

    Attributes:
        freq_mhz: requested clock, MHz.
        points: kernels.
        time_mape: mean absolute relative error of the duration.
        power_mape: of the power.
    """

    freq_mhz: float
    points: int
    time_mape: float
    power_mape: float


def leave_one_clock_out(ev: GpuEvidence) -> Iterator[HeldOutClock]:
    """Fit the kernels without each requested clock in turn."""
    gpu = load_gpu(ev.gpu)
    points = ev.kernels.points
    for clock in sorted({p.freq_mhz for p in points}):
        rest = tuple(p for p in points if p.freq_mhz != clock)
        out = [p for p in points if p.freq_mhz == clock]
        kernels = ev.kernels.model_copy(update={"points": rest})
        fit = GpuFit(ev.model_copy(update={"kernels": kernels}), gpu, (), {})
        values = fit.values(fit.solve(fixed_values(ev), fit.unmoved()), fixed_values(ev))
        time, power = predict_kernels(out, gpu, values)
        yield HeldOutClock(
            clock,
            len(out),
            float(np.abs(time / np.array([p.time_us * 1e-6 for p in out]) - 1.0).mean()),
            float(np.abs(power / np.array([p.power_w for p in out]) - 1.0).mean()),
        )


def held_out_path(gpu: str) -> Path:
    """File with what the fit of a GPU says about what it was not shown."""
    return configs_dir() / "gpus" / "held-out" / f"{gpu}.yaml"


def held_out_record(
    gpu: str,
    n_members: int = 32,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Both kinds of leaving out, as plain figures; minutes.

    Args:
        gpu: GPU with evidence of its own.
        n_members: members that a band is made of.
        workers: where members are fitted; None: in this process.
        progress: called with (done, all) after each member.
    """
    ev = load_gpu_evidence(gpu)
    servers = [s.record() for s in leave_one_llm_out(ev, n_members, workers, progress)]
    points = sum(int(s["points"]) for s in servers)
    inside = {
        f"{what}_coverage": round(sum(int(s[f"{what}_inside_5_95"]) for s in servers) / points, 3)
        for what in ("itl", "power")
        if points
    }
    return {
        "gpu": gpu,
        "evidence_sha256": sha256(evidence_dir() / f"{gpu}.yaml"),
        "members": n_members,
        "left_out": "one LLM at a time with all its servers; host time and energy factor unknown",
        "band": "5th to 95th percentile of the members",
        **inside,
        "servers": servers,
        "clocks": [
            {
                "freq_mhz": c.freq_mhz,
                "kernels": c.points,
                "time_mape": round(c.time_mape, 4),
                "power_mape": round(c.power_mape, 4),
            }
            for c in leave_one_clock_out(ev)
        ],
    }


def write_held_out(
    gpu: str, workers: Workers | None = None, progress: Progress | None = None
) -> Path:
    """Make the record of a GPU anew and write it beside the layer."""
    path = held_out_path(gpu)
    record = held_out_record(gpu, workers=workers, progress=progress)
    write_whole(path, yaml.safe_dump(record, sort_keys=False, width=150))
    return path


def read_held_out(gpu: str) -> dict[str, Any] | None:
    """The committed record of a GPU; None where nothing could be left out."""
    path = held_out_path(gpu)
    if not path.is_file():
        return None
    record: dict[str, Any] = read_yaml(path)
    return record
