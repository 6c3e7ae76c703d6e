"""The run directory: rows appended as runs finish, merged atomically, resumable at any point.

Layout. ``config.yaml`` (resolved), ``provenance.json``, ``parts/<run_id>/`` (one folder per
finished run), and once merged ``results.parquet``, ``requests.parquet``, ``timelines.parquet``,
``windows.parquet`` (one row group per run), ``curves.parquet`` and ``members.parquet`` (of a tuned
policy, with the first of its runs) and ``summary.csv``; ``infeasible.csv`` where a point
cannot be served at all. A part folder appears in one rename, so it is whole or absent; merged files
are written beside and then renamed, and parts go only when all of them are in place. One writer
holds ``.lock``.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import yaml

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import debris, lock, naming, open_whole, write_whole
from biscale_env.evaluation.runs import results, run_files
from biscale_env.evaluation.runs.blocks import WINDOW_COLUMNS, window_totals
from biscale_env.evaluation.runs.provenance import provenance
from biscale_env.evaluation.runs.record import (
    INFEASIBLE_COLUMNS,
    INSTANCE,
    REQUEST_COLUMNS,
    SLO_CLASS,
    TIMELINE_COLUMNS,
    RunRecord,
    run_id,
)
from biscale_env.evaluation.runs.run_view import Run, load_run
from biscale_env.evaluation.stats.judging import CACHED, FAILED, failures
from biscale_env.evaluation.stats.metrics import results_row

_ABSENT: Final = "absent"
_WRITTEN: Final = (
    run_files.CONFIG,
    run_files.PROVENANCE,
    run_files.RESULTS,
    *run_files.TABLES,
    *run_files.JOB_TABLES,
    run_files.SUMMARY,
    run_files.DECOMPOSITION,
    run_files.CLASSES,
    run_files.INFEASIBLE,
    run_files.TUNING,
    run_files.REPORT,
)


def joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Policies of a run and those it is resumed with, per phase ``[name, build]`` pairs.

    The old ones first.

    Raises:
        BiscaleError: a name stands for something else now.
    """
    together = {
        phase: [*old[phase], *(pair for pair in new[phase] if pair not in old[phase])]
        for phase in new
    }
    for pairs in together.values():
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            builds = ", ".join(build for name, build in pairs if name == twice)
            raise BiscaleError(
                f"cannot resume: policy '{twice}' stands for two things here ({builds}); rename "
                "one, name=build"
            )
    return together


class RunDirectory:
    """A run directory that is being written; a context manager.

    It is locked against a second writer for as long. Leaving it, by whatever way, merges the parts.

    Example:
        ``with RunDirectory(path, config, resume=True) as run:`` then, for each run that is not
        ``run.has(key)``, ``run.add(record)``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        inputs: Mapping[str, str] | None = None,
        seeds: Mapping[str, Any] | None = None,
    ) -> None:
        """Create the directory, or resume an interrupted one.

        Args:
            path: the directory; made when it is not there.
            config: the resolved configuration; resuming needs the same, but may add policies.
            resume: go on with what an earlier session left behind.
            inputs: SHA-256 of what goes in (traces, models, checkpoints), by its name in a
                sentence; kept in the provenance, and what has changed is refused on resuming.
            seeds: seeds that the comparison was made with.

        Raises:
            BiscaleError: the directory is in use, holds a run of another configuration or of other
                inputs, or a file of it is damaged.
        """
        self.path = Path(path)
        self.config = run_files.plain(config)
        if self.path.exists() and not self.path.is_dir():
            raise BiscaleError(f"{self.path} is a file; give a folder for the run directory")
        if not (self.path / run_files.CONFIG).is_file():
            self._check_empty()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BiscaleError(
                f"cannot make the run directory {self.path}: {error.strerror}"
            ) from None
        self._held = ExitStack()  # freed with this object, too
        self._held.enter_context(
            lock(self.path / run_files.LOCK, what=f"the run directory {self.path}")
        )
        try:
            self._open(resume, dict(inputs or {}), run_files.plain(seeds or {}))
        except BaseException:
            self._held.close()
            raise

    def _check_empty(self) -> None:
        """Refuse a folder of something else; a run that died before its first file is empty."""
        if self.path.is_dir():
            ours = {self.path / run_files.LOCK, *debris(self.path, run_files.CONFIG)}
            if set(self.path.iterdir()) - ours:
                raise BiscaleError(
                    f"{self.path} is not empty and not a run directory; choose another --out"
                )

    def _open(self, resume: bool, inputs: dict[str, str], seeds: Any) -> None:
        known, signed = self.path / run_files.CONFIG, self.path / run_files.PROVENANCE
        record = provenance(inputs=inputs, seeds=seeds)
        if known.is_file():
            if not resume:
                raise BiscaleError(
                    f"{self.path} holds a run already; add --resume or choose another --out"
                )
            run_files.check_readable(self.path)
            self._take_up(run_files.read_config(self.path))
            if signed.is_file():
                before = run_files.read_provenance(self.path)
                self._check_inputs(before.get("sha256", {}), inputs)
                record["sha256"] = before.get("sha256", {}) | inputs
                record["earlier"] = [*before.pop("earlier", []), before]
        self._sweep()
        (self.path / run_files.PARTS).mkdir(exist_ok=True)
        write_whole(known, yaml.safe_dump(self.config, sort_keys=True, allow_unicode=True))
        write_whole(signed, json.dumps(record, indent=2) + "\n")
        self._done = self._finished()

    def _check_inputs(self, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        """Refuse to mix runs on different traces, models or checkpoints of one name."""
        changed = next((name for name in now if before.get(name, now[name]) != now[name]), None)
        if changed is not None:
            raise BiscaleError(
                f"cannot resume {self.path}: {changed} has changed since (sha256 was "
                f"{before[changed][:12]} and is now {now[changed][:12]}); restore it or choose "
                "another --out"
            )

    def _sweep(self) -> None:
        """Remove what a killed writer left half done; the lock says that none is alive."""
        for leftover in (self.path / run_files.PARTS).glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for name in _WRITTEN:
            for temporary in debris(self.path, name):
                temporary.unlink(missing_ok=True)

    def _take_up(self, old: Any) -> None:
        """Continue with the configuration that is there.

        The same one, but for policies that are new.
        """
        new = yaml.safe_load(yaml.safe_dump(self.config))
        known, asked = old.get("policies"), new.get("policies")
        if isinstance(known, dict) and isinstance(asked, dict) and known.keys() == asked.keys():
            new["policies"] = self.config["policies"] = joined(known, asked)
            old = old | {"policies": new["policies"]}
        if old == new:
            return
        before, after = run_files.flat(old), run_files.flat(new)
        key = next(
            k for k in sorted(before | after) if before.get(k, _ABSENT) != after.get(k, _ABSENT)
        )
        raise BiscaleError(
            f"cannot resume {self.path}: '{key}' was {before.get(key, _ABSENT)} and is now "
            f"{after.get(key, _ABSENT)}; "
            "resume with the same settings or choose another --out"
        )

    def _finished(self) -> set[str]:
        done = {part.name for part in self._parts()}
        if (self.path / run_files.RESULTS).is_file():
            done |= set(run_files.read_results(self.path / run_files.RESULTS)["run_id"])
        return done

    def _parts(self) -> list[Path]:
        return sorted(
            p
            for p in (self.path / run_files.PARTS).glob("*")
            if p.is_dir() and not p.name.startswith(".")
        )

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether the run with these key columns (``RunRecord.key``) has been finished before."""
        return run_id(key) in self._done

    def add(
        self,
        record: RunRecord,
        *,
        keep_timeline: bool = True,
        keep_requests: bool = True,
        further: Mapping[str, pd.DataFrame] | None = None,
    ) -> dict[str, Any]:
        """Keep one finished run on disk and return its row.

        The row lacks the columns that compare it with others.

        Args:
            record: the run.
            keep_timeline: store its decisions too; large comparisons keep those of one workload
                only.
            keep_requests: store its requests too.
            further: tables that belong to the whole policy and go with this run of it, by the file
                name of ``run_files.JOB_TABLES``; empty ones are left out.

        Raises:
            OSError: it cannot be written; then nothing of it is there.
        """
        row = results_row(record)
        run = row["run_id"]
        target = self.path / run_files.PARTS / run
        folder = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
        try:
            with naming(target):
                self._write_part(
                    folder, record, row, keep_timeline=keep_timeline, keep_requests=keep_requests
                )
                for name, frame in (further or {}).items():
                    if len(frame):
                        table = run_files.frame_table(run, frame)
                        pq.write_table(table, folder / name, compression="zstd")
            shutil.rmtree(target, ignore_errors=True)
            folder.replace(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._done.add(run)
        return row

    @staticmethod
    def _write_part(
        folder: Path,
        record: RunRecord,
        row: dict[str, Any],
        *,
        keep_timeline: bool,
        keep_requests: bool,
    ) -> None:
        pd.DataFrame([row]).to_parquet(folder / run_files.RESULTS, index=False)
        tables: dict[str, tuple[Mapping[str, Any], Sequence[str]]] = {
            run_files.WINDOWS: (window_totals(record), WINDOW_COLUMNS)
        }
        if keep_requests:
            none = np.zeros(np.size(record.requests[REQUEST_COLUMNS[0]]))
            requests = {CACHED: none, **record.requests, FAILED: failures(record.requests)}
            named = (SLO_CLASS,) if SLO_CLASS in record.requests else ()
            kept = (*REQUEST_COLUMNS, CACHED, FAILED, *named)
            tables[run_files.REQUESTS] = (requests, kept)
        if keep_timeline:
            numbered = (INSTANCE,) if INSTANCE in record.timeline else ()
            tables[run_files.TIMELINES] = (record.timeline, (*TIMELINE_COLUMNS, *numbered))
        for name, (columns, names) in tables.items():
            pq.write_table(
                run_files.run_table(row["run_id"], columns, names),
                folder / name,
                compression="zstd",
            )

    def name_infeasible(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Keep, beside the results, the operating points that max clock cannot serve at any load.

        Args:
            points: ``Infeasible.point`` of each.
        """
        if points:
            frame = pd.DataFrame(list(points), columns=list(INFEASIBLE_COLUMNS))
            write_whole(self.path / run_files.INFEASIBLE, frame.to_csv(index=False))

    def merge(self) -> Run | None:
        """Merge finished parts into the Parquet files and the summary.

        None when nothing has finished yet.
        """
        parts = self._parts()
        old = [self.path / run_files.RESULTS] if (self.path / run_files.RESULTS).is_file() else []
        new = [part / run_files.RESULTS for part in parts]
        frames = [run_files.read_results(path) for path in [*old, *new]]
        if not frames:
            return None
        rows = pd.concat(frames, ignore_index=True).drop_duplicates("run_id", keep="last")
        for name in (*run_files.TABLES, *run_files.JOB_TABLES):
            run_files.merge_tables(
                self.path / name, [part / name for part in parts if (part / name).is_file()]
            )
        with open_whole(self.path / run_files.RESULTS) as temporary:
            results.complete(rows).to_parquet(temporary, index=False)
        for part in parts:
            shutil.rmtree(part)
        run = load_run(self.path)
        with open_whole(self.path / run_files.SUMMARY) as temporary:
            run.summary().to_csv(temporary, index=False)
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._held:
            try:
                self.merge()
            except (OSError, BiscaleError):
                if error is None:  # else what went wrong first is told; the parts stay
                    raise
