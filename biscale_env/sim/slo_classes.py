"""The bound of a request: the SLO's own, or that of its class."""

from typing import Any

from biscale_env.core.jit import inlined
from biscale_env.sim.state import Requests


@inlined
def bound_s(p: Any, requests: Requests, r: int) -> float:
    """Bound of request ``r``, s: TTFT in prefill, TPOT in decode."""
    if p.classes == 0:
        return p.slo_s
    return p.slo_s * p.class_scale[requests.slo_class[r]]


@inlined
def count_violation(st: Any, p: Any, requests: Requests, r: int) -> None:
    """Request ``r`` has missed its bound."""
    st.step_violations += 1
    st.violations += 1
    st.step_missed += 1.0 if p.classes == 0 else p.class_weight[requests.slo_class[r]]
