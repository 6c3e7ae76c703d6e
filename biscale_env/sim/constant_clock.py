"""Compiled runs at one constant clock.

What capacity searches, tables of static clocks and the speed figures use.

The transitions are those of the environments; only the loop around them is compiled too.
"""

from typing import Any

from biscale_env.core.jit import compiled
from biscale_env.sim.clock import snap_ghz
from biscale_env.sim.decode import decode_reset, decode_step
from biscale_env.sim.prefill import prefill_reset, prefill_step


@compiled
def prefill_static(
    st: Any, c: Any, p: Any, arrival_s: Any, prompt: Any, first_token_s: Any, freq_ghz: float
) -> None:
    """Run one prefill instance over the whole workload at one clock (settled before the first
    request).
    """
    prefill_reset(st, c, p, arrival_s, prompt, 0, arrival_s.size, snap_ghz(p, freq_ghz))
    while st.done == 0:
        prefill_step(st, c, p, arrival_s, prompt, first_token_s, freq_ghz)


@compiled
def decode_static(
    st: Any, c: Any, p: Any, arrival_s: Any, prompt: Any, output: Any, start_s: Any, finish_s: Any, slots: Any, ring: Any, tree: Any,
    stack: Any, freq_ghz: float,
) -> None:  # fmt: skip
    """Run one decode instance over the whole workload at one clock (settled before the first
    request).
    """
    decode_reset(
        st, c, p, arrival_s, prompt, output, start_s, slots, ring, tree, stack, 0, arrival_s.size, snap_ghz(p, freq_ghz)
    )  # fmt: skip
    while st.done == 0:
        decode_step(
            st,
            c,
            p,
            arrival_s,
            prompt,
            output,
            start_s,
            finish_s,
            slots,
            ring,
            tree,
            stack,
            freq_ghz,
        )
