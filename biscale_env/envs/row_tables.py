"""A place of its own for the requests of every row of a batch, so that their times can be kept.

Rows that share a table cannot: two may run the same workload at once.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from biscale_env.envs.batch import Batch, RequestTable


class RowTables:
    """Workloads copied to the rows that run them.

    Attributes:
        pool: the table that the batch runs; workload i is that of row i.
    """

    def __init__(self, source: RequestTable, n: int) -> None:
        """Make room for the longest workload in every row.

        Args:
            source: all workloads.
            n: rows of the batch.
        """
        longest = int((source.ends - source.begins).max())
        stride = longest + 1  # of the cumulative counts, one more than requests
        begins = np.arange(n, dtype=np.int64) * stride
        size = n * stride
        self._source = source
        self.pool = replace(
            source,
            arrival_s=np.zeros(size),
            prompt=np.zeros(size, dtype=np.int32),
            output=np.full(size, source.output.max(), dtype=np.int32),
            cumulative=np.zeros(size, dtype=np.int64),
            begins=begins,
            ends=begins.copy(),
            durations_s=np.zeros(n),
            prefix=np.zeros(size, dtype=np.int32),
            slo_class=np.zeros(size if source.slo_class.size else 0, dtype=np.int8),
        )

    def take(
        self, rows: NDArray[np.int64], workloads: NDArray[np.int64], batch: Batch
    ) -> NDArray[np.int64]:
        """Copy workloads to rows, forget the times of their requests, and return their numbers.

        Args:
            rows: of the batch.
            workloads: of the source, one per row.
            batch: runs the pool.
        """
        source, pool = self._source, self.pool
        for row, workload in zip(rows.tolist(), workloads.tolist(), strict=True):
            begin, end = int(source.begins[workload]), int(source.ends[workload])
            first = int(pool.begins[row])
            last = first + end - begin
            pool.arrival_s[first:last] = source.arrival_s[begin:end]
            pool.prompt[first:last] = source.prompt[begin:end]
            pool.output[first:last] = source.output[begin:end]
            pool.prefix[first:last] = source.prefix[begin:end]
            if source.slo_class.size:
                pool.slo_class[first:last] = source.slo_class[begin:end]
            pool.cumulative[first : last + 1] = source.cumulative[begin : end + 1]
            pool.ends[row], pool.durations_s[row] = last, source.durations_s[workload]
            batch.start_s[first:last] = np.nan
            batch.finish_s[first:last] = np.nan
        return rows
