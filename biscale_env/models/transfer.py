"""A fitted model on another GPU or with another LLM than it was fitted with.

What can be known without a measurement follows the descriptions; what cannot is kept and says so:

- *Counted* work (operations and bytes per token) is that of the new LLM, exactly.
- The *power cap* and the clocks are those of the new GPU; memory for the KV cache follows both.
- *Times* are scaled to first order, as a roofline does: by the ratio of the counted work, and by
  the ratio of the data-sheet rates (operations per clock cycle, HBM and NVLink bandwidth) that
  bound them. Constant kernel times go with the number of layers. Host time is kept.
- *Energies*, static and clock power, voltage curve and the clocks of its knees are those of the new
  GPU's own fitted layer, and of the GPU of the fit where there is none: no data sheet tells them.
- Nothing is moved between a dense LLM and one with experts: the fit of one says nothing about the
  other.

The ensemble is moved by the same factors. A table of one's own hardware (``biscale fit --profile``)
replaces all this with measurements.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from biscale_env.config.hardware import Gpu, Llm
from biscale_env.core.errors import BiscaleError
from biscale_env.models.coefficient import Coefficient
from biscale_env.models.coefficient_files import ModelFile
from biscale_env.models.geometry import counted_work
from biscale_env.models.physics import GPU_FIELDS

# coefficient: (work that it is a time of, rate of the GPU that bounds it)
TIMES: Final = {
    "weights_s": ("weight_bytes", "memory"),
    "gemm_s_per_token": ("flops_per_token", "compute"),
    "experts_s": ("expert_bytes", "memory"),
    "expert_s_per_token": ("flops_per_token", "compute"),
    "attn_prefill_s": ("flops_per_attn", "compute"),
    "attn_decode_s": ("kv_bytes_per_token", "memory"),
    "comm_s_per_token": ("link_bytes_per_token", "link"),
    "elem_s_per_token": ("bytes_per_token", "memory"),
}
PER_LAYER: Final = ("gemm0_s", "attn0_s", "comm0_s", "elem0_s")


@dataclass(frozen=True)
class Hardware:
    """A GPU and the LLM that runs on it."""

    gpu: Gpu
    llm: Llm

    @property
    def label(self) -> str:
        """Both names, for messages."""
        return f"{self.gpu.name} with {self.llm.name}"

    def as_json(self) -> tuple[str, str]:
        """Both descriptions as text, to compare and to hash."""
        return self.gpu.model_dump_json(), self.llm.model_dump_json()

    def physics(self) -> tuple[dict[str, object], dict[str, object]]:
        """Everything but names and sources: what tells whether two of them behave alike."""
        told = {"name", "sources", "off_power_w", "idle_power_w"}  # the last two: no coefficients
        return self.gpu.model_dump(exclude=told), self.llm.model_dump(exclude=told)


@dataclass(frozen=True)
class Move:
    """How coefficients change between two hardwares.

    Attributes:
        fixed: coefficients with a new value.
        factor: coefficients that are multiplied.
    """

    fixed: dict[str, float]
    factor: dict[str, float]

    def apply(self, records: np.recarray) -> np.recarray:
        """Moved coefficients, a copy; records of ``COEFFICIENT_DTYPE``."""
        out = records.copy()
        for name, value in self.fixed.items():
            out[name] = value
        for name, value in self.factor.items():
            out[name] *= value
        return out


def _kept(c: Coefficient, old: Hardware) -> Coefficient:
    return c.model_copy(update={"source": f"kept from the fit on {old.label}: {c.source}"})


def _ratio(new: float, old: float) -> float:
    return new / old if old > 0 else 1.0


def time_ratios(old: Gpu, new: Gpu) -> dict[str, float]:
    """Time of a unit of work on the new GPU relative to the old, by what bounds it.

    Compute at the same clock: the peak belongs to the highest clock of each.
    """
    return {
        "memory": old.hbm_gb_per_s / new.hbm_gb_per_s,
        "link": old.nvlink_gb_per_s / new.nvlink_gb_per_s,
        "compute": (old.peak_bf16_tflops / old.freq_max_mhz)
        / (new.peak_bf16_tflops / new.freq_max_mhz),
    }


def plan_move(
    content: ModelFile, old: Hardware, new: Hardware, clock_ratio: float = 1.0
) -> Move | None:
    """How the coefficients of a file change; None if nothing physical differs.

    Args:
        content: the file.
        old: hardware of the fit.
        new: hardware that was asked for.
        clock_ratio: profile clock of the old GPU's layer over that of the new one's, since times
            are given at it.

    Raises:
        BiscaleError: from a dense LLM to one with experts, or back.
    """
    before, after = old.physics(), new.physics()
    if before == after:
        return None
    if bool(old.llm.experts) != bool(new.llm.experts):
        raise BiscaleError(
            f"model '{content.name}' was fitted with {old.llm.name}, and {new.llm.name} differs "
            "from it by its experts: make its own with `biscale models build`"
        )
    fixed: dict[str, float] = {}
    factor: dict[str, float] = {}
    rates = time_ratios(old.gpu, new.gpu)
    was = counted_work(old.llm, content.tp, content.dtype, old.gpu.multiplies_mxfp4)
    is_now = counted_work(new.llm, content.tp, content.dtype, new.gpu.multiplies_mxfp4)
    if before[1] != after[1]:
        fixed |= is_now
    for name, (work, bound) in TIMES.items():
        clocks = clock_ratio if bound == "compute" else 1.0
        factor[name] = _ratio(is_now[work], was[work]) * rates[bound] * clocks
    factor |= dict.fromkeys(PER_LAYER, new.llm.layers / old.llm.layers)
    return Move(fixed, {name: value for name, value in factor.items() if value != 1.0})


def moved_file(content: ModelFile, move: Move, old: Hardware, new: Hardware) -> ModelFile:
    """The coefficient file with moved values, each with what it rests on now."""
    made = {}
    for name, c in content.coefficients.items():
        if name in move.fixed:
            what = f"description of {new.llm.name}"
            made[name] = Coefficient(value=move.fixed[name], provenance="derived", source=what)
        elif name in move.factor:
            made[name] = Coefficient(
                value=c.value * move.factor[name],
                provenance="derived",
                source=f"scaled from {old.label} to {new.label} by counted work and data-sheet "
                f"rates: {c.source}",
            )
        else:
            made[name] = c if name in GPU_FIELDS else _kept(c, old)
    return content.model_copy(
        update={"gpu": new.gpu.name, "llm": new.llm.name, "coefficients": made}
    )
