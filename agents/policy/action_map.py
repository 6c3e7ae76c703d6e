"""From the output of a network to a clock, and back.

====== ========================================================== =============================
kind   action in [-1, 1]                                          output
====== ========================================================== =============================
rule   ``clip(rule + 2 span output)``                             (n,), clipped to [-1, 1]
clock  ``clip(output)``                                           (n,), clipped to [-1, 1]
levels the action of control level number ``output``              (n,), integers
====== ========================================================== =============================
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.policy.feature_parts import Floats32, spread_levels_mhz
from biscale_env.contract import ClockRange


def within_range(values: Floats32) -> Floats32:
    """Values clipped to [-1, 1]; several times as fast as ``np.clip`` on a few numbers."""
    return np.minimum(np.maximum(values, -1.0), 1.0)


@dataclass(frozen=True)
class ActionMap:
    """Actions of outputs for one GPU.

    Attributes:
        kind: ``rule``, ``clock`` or ``levels``.
        span: fraction of the control range that full output spans, with ``rule``.
        levels: actions of the clock levels, rising.
    """

    kind: str
    span: float
    levels: Floats32

    @classmethod
    def of(
        cls, kind: str, span: float, clocks: ClockRange, outputs: int | None = None
    ) -> "ActionMap":
        """The map for a GPU.

        Args:
            kind: ``rule``, ``clock`` or ``levels``.
            span: fraction of the control range, with ``rule``.
            clocks: control range and levels of the GPU.
            outputs: levels that a network trained with ``levels`` chooses among: another number
                than the GPU has is spread over the GPU's; None takes the GPU's own.
        """
        count = len(clocks.levels_mhz) if kind != "levels" or outputs is None else outputs
        return cls(kind, float(span), clocks.to_action(spread_levels_mhz(clocks, count)))

    def __call__(self, output: NDArray[Any], rule: Floats32) -> Floats32:
        """Action (n,) of outputs of any shape with n values, where the rule says (n,)."""
        if self.kind == "levels":
            return self.levels[np.asarray(output).reshape(len(rule))]
        flat = np.asarray(output, dtype=np.float32).reshape(len(rule))
        return within_range(self.unclipped(flat, rule))

    def unclipped(self, output: Any, rule: Any) -> Any:
        """Action of a continuous output before it is clipped, (n,); arrays or tensors alike."""
        return rule + 2.0 * self.span * output if self.kind == "rule" else output

    def output_for(self, action: Floats32, rule: Floats32) -> Floats32:
        """Output (n,) that comes nearest to an action (n,)."""
        flat = np.asarray(action, dtype=np.float32).reshape(len(rule))
        if self.kind == "levels":
            return np.abs(flat[:, None] - self.levels[None]).argmin(axis=1).astype(np.float32)
        if self.kind == "rule":
            flat = (flat - rule) / np.float32(2.0 * self.span)
        return within_range(flat)
