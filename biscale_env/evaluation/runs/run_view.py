"""A finished run directory, opened: in notebooks, by the report, by tests."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.runs import results, run_files
from biscale_env.evaluation.runs.equal_columns import add_equal_attainment
from biscale_env.evaluation.runs.member_columns import add_member_range
from biscale_env.evaluation.runs.record import INFEASIBLE_COLUMNS, SCENARIO_COLUMNS
from biscale_env.evaluation.stats.class_metrics import slo_of
from biscale_env.evaluation.stats.intervals import add_intervals
from biscale_env.evaluation.stats.judging import judge, judged_latency_s


class Run:
    """The results of a comparison, read as they are needed.

    Attributes:
        path: the run directory.
        results: the completed results frame, one row per run.
    """

    def __init__(self, path: Path, frame: pd.DataFrame) -> None:
        self.path = path
        self.results = frame

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return run_files.read_config(self.path)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Command line, revision, package versions, digests of inputs, seeds."""
        return run_files.read_provenance(self.path)

    @cached_property
    def infeasible(self) -> list[dict[str, Any]]:
        """Operating points without runs, since max clock cannot serve them at any load.

        ``reason`` says what shows it.
        """
        frame = run_files.read_csv(self.path / run_files.INFEASIBLE, INFEASIBLE_COLUMNS)
        return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]

    @property
    def requests(self) -> pd.DataFrame:
        """All kept requests of all runs, with their ``run_id``.

        Large; :meth:`requests_of` reads one run.
        """
        return self._all(run_files.REQUESTS)

    @property
    def timelines(self) -> pd.DataFrame:
        """All kept decisions of all runs, with their ``run_id``.

        Large; :meth:`timeline_of` reads one run.
        """
        return self._all(run_files.TIMELINES)

    @cached_property
    def windows(self) -> pd.DataFrame:
        """Totals per run and window of time; see :mod:`biscale_env.evaluation.runs.blocks`."""
        return self._all(run_files.WINDOWS)

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Settings of tuned policies on the judged workloads, a row per setting and window.

        Columns ``run_id`` (the policy's first run), ``setting`` (text), ``window, day, energy_j,
        n_met, n_counted, output_tokens, copies``. Empty without tuning.
        """
        return self._all(run_files.CURVES)

    @cached_property
    def member_runs(self) -> pd.DataFrame:
        """Chosen settings in members of the ensemble: ``run_id, member, energy_j, attainment``.

        Empty where none were asked for.
        """
        return self._all(run_files.MEMBERS)

    @cached_property
    def tuning(self) -> pd.DataFrame:
        """What tuning tried on the tuning workloads: one row per policy and setting.

        Empty without tuning.
        """
        return run_files.read_csv(self.path / run_files.TUNING)

    def _all(self, name: str) -> pd.DataFrame:
        path = self.path / name
        if not path.is_file():
            return pd.DataFrame({"run_id": pd.Series([], dtype=str)})
        frame = run_files.read_results(path).astype({"run_id": str})
        known = frame["run_id"].isin(self.results["run_id"])
        return frame if known.all() else frame[known]  # a run that goes on writes its result last

    def _one(self, name: str, run_id: str) -> dict[str, NDArray[np.float64]] | None:
        path = self.path / name
        if not path.is_file():
            return None
        if name not in self._groups:
            with run_files.reading(path), pq.ParquetFile(path) as file:
                self._groups[name] = (file.metadata, run_files.row_groups(file))
        metadata, groups = self._groups[name]
        if run_id not in groups:
            return None
        with run_files.reading(path), pq.ParquetFile(path, metadata=metadata) as file:
            table = file.read_row_group(groups[run_id])
        return {
            n: np.asarray(table[n].to_numpy(), dtype=np.float64)
            for n in table.column_names
            if n != "run_id"
        }

    @cached_property
    def _groups(self) -> dict[str, tuple[pq.FileMetaData, dict[str, int]]]:
        return {}

    def requests_of(self, run_id: str) -> dict[str, NDArray[np.float64]] | None:
        """Requests of one run as arrays; None when they were not kept."""
        return self._one(run_files.REQUESTS, run_id)

    def timeline_of(self, run_id: str) -> dict[str, NDArray[np.float64]] | None:
        """Decisions of one run as arrays; None when they were not kept."""
        return self._one(run_files.TIMELINES, run_id)

    @cached_property
    def _rows(self) -> dict[str, dict[str, Any]]:
        return {
            row["run_id"]: {str(k): v for k, v in row.items()}
            for row in self.results.to_dict("records")
        }

    def row(self, run_id: str) -> dict[str, Any]:
        """Results row of one run."""
        if run_id not in self._rows:
            raise BiscaleError(f"no run '{run_id}' in {self.path}")
        return dict(self._rows[run_id])

    def latencies(
        self, run_id: str, metric: str
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Judged latencies and arrivals of one run, s; None when its requests were not kept.

        Args:
            run_id: the run.
            metric: ``ttft`` or ``tpot``.
        """
        row = self.row(run_id)
        if row["phase"] == {"ttft": "decode", "tpot": "prefill"}[metric]:
            return None
        columns = self.requests_of(run_id)
        if columns is None:
            return None
        counted = judge(columns, slo_of(row), row["phase"], row["duration_s"])["counted"]
        if metric == "tpot":
            counted &= columns["output_tokens"] > 1
        values = judged_latency_s(columns, metric, counted, row["duration_s"])
        return values, columns["arrival_s"][counted]

    @cached_property
    def _summary(self) -> pd.DataFrame:
        summary = results.summarise(self.results)
        if not len(summary):
            return summary
        summary = add_intervals(summary, self.results, self.windows, self.latencies)
        summary = add_equal_attainment(summary, self.results, self.curves)
        return add_member_range(summary, self.results, self.member_runs)

    def summary(self) -> pd.DataFrame:
        """One row per operating point and policy, with 95 % intervals."""
        return self._summary.copy()

    def points(self) -> list[dict[str, Any]]:
        """The operating points (phase, scenario, SLO, load, placement), in order of the results."""
        rows = self.results.drop_duplicates(list(SCENARIO_COLUMNS))[list(SCENARIO_COLUMNS)].to_dict(
            "records"
        )
        return [{str(k): v for k, v in row.items()} for row in rows]


def load_run(path: str | os.PathLike[str]) -> Run:
    """Open a run directory.

    Raises:
        BiscaleError: there are no merged results in it, or an older version wrote them.
    """
    folder = Path(path)
    if not (folder / run_files.RESULTS).is_file():
        raise BiscaleError(
            f"{folder} holds no {run_files.RESULTS}: give the folder that a comparison wrote"
        )
    frame = run_files.read_results(folder / run_files.RESULTS)
    if "target" not in frame:
        raise BiscaleError(
            f"{folder / run_files.RESULTS} has no column 'target': an older version wrote it; "
            "run the comparison again"
        )
    return Run(folder, frame)
