"""Request tables of workloads, kept once they were made: a reset makes nothing twice."""

from collections import OrderedDict

from biscale_env.envs.batch import RequestTable
from biscale_env.envs.loads.workloads import WorkloadSource
from biscale_env.envs.plant import Plant

KEPT_REQUESTS = 2_000_000  # of about 30 bytes each, in one environment


class WorkloadTables:
    """Tables of one workload each, made on demand; those that were used longest ago are dropped."""

    def __init__(
        self, plant: Plant, source: WorkloadSource, kept_requests: int = KEPT_REQUESTS
    ) -> None:
        """Remember where workloads come from.

        Args:
            plant: what they have to fit into.
            source: makes them.
            kept_requests: requests that are kept in memory at most (one workload always is).
        """
        self._plant, self._source, self._limit = plant, source, kept_requests
        self._kept: OrderedDict[int, RequestTable] = OrderedDict()
        self._requests = 0

    def of(self, workload: int) -> RequestTable:
        """The table of one workload.

        Raises:
            BiscaleError: the source yields no requests, or one that can never fit.
        """
        table = self._kept.get(workload)
        if table is not None:
            self._kept.move_to_end(workload)
            return table
        table = RequestTable.of(self._plant, [self._source.workload(workload)])
        self._kept[workload] = table
        self._requests += len(table.arrival_s)
        while self._requests > self._limit and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._requests -= len(dropped.arrival_s)
        return table
