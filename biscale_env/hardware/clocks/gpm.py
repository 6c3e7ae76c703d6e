"""Tensor-core and memory use through NVML's GPM, which Hopper and later have.

Read from the header; not run on hardware here.
"""

import time
from collections.abc import Sequence
from typing import Any

from biscale_env.hardware.clocks.backend import ClockBackend, ClockError

METRICS = {
    "sm_util_pct": 2,
    "sm_occupancy_pct": 3,
    "tensor_util_pct": 5,
    "dram_bw_util_pct": 10,
}  # nvmlGpmMetricId_t
PERIOD_S = 0.2  # two samples must lie more than 100 ms apart (nvml.h)


class Gpm:
    """Two alternating samples per GPU.

    Every call of :meth:`sample` gives what lies between the last two.
    """

    def __init__(self, nvml: Any, handles: dict[str, Any]) -> None:
        self._nvml, self._handles = nvml, handles
        self._before = {uuid: self._take(handle) for uuid, handle in handles.items()}
        self._due_s = time.monotonic() + PERIOD_S

    def _take(self, handle: Any) -> Any:
        sample = self._nvml.nvmlGpmSampleAlloc()
        self._nvml.nvmlGpmSampleGet(handle, sample)
        return sample

    def sample(self) -> list[dict[str, Any]]:
        """Use per GPU since the sample before; empty when it is too early."""
        now = time.monotonic()
        if now < self._due_s:
            return []
        self._due_s = now + PERIOD_S
        found = []
        for uuid, handle in self._handles.items():
            after = self._take(handle)
            query = self._nvml.c_nvmlGpmMetricsGet_t()
            query.version, query.numMetrics = self._nvml.NVML_GPM_METRICS_GET_VERSION, len(METRICS)
            query.sample1, query.sample2 = self._before[uuid], after
            for k, number in enumerate(METRICS.values()):
                query.metrics[k].metricId = number
            self._nvml.nvmlGpmMetricsGet(query)
            values = {name: float(query.metrics[k].value) for k, name in enumerate(METRICS)}
            found.append({"time_s": now, "gpu": uuid, **values})
            self._nvml.nvmlGpmSampleFree(self._before[uuid])
            self._before[uuid] = after
        return found

    def close(self) -> None:
        """Free the samples."""
        for sample in self._before.values():
            self._nvml.nvmlGpmSampleFree(sample)
        self._before.clear()


def open_gpm(backend: ClockBackend, uuids: Sequence[str]) -> Gpm | None:
    """GPM on these GPUs, or None where backend, driver or GPU have none."""
    inner: Any = getattr(backend, "inner", backend)
    inner = getattr(inner, "reader", inner)
    nvml = getattr(inner, "_nvml", None)
    if nvml is None:
        return None
    try:
        handles = {uuid: inner._handle(uuid) for uuid in uuids}
        if not all(nvml.nvmlGpmQueryDeviceSupport(h).isSupportedDevice for h in handles.values()):
            return None
        return Gpm(nvml, handles)
    except (nvml.NVMLError, AttributeError, ClockError):
        return None
