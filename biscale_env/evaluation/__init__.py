"""Everything after a run has been simulated.

Metrics, statistics, the results frame, the run directory, the report.
"""

from biscale_env.evaluation.first_look import evaluate
from biscale_env.evaluation.runs.record import REFERENCE_POLICY, RunRecord
from biscale_env.evaluation.runs.results import results_frame, summarise
from biscale_env.evaluation.runs.run_view import Run, load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.evaluation.stats.metrics import results_row

__all__ = [
    "REFERENCE_POLICY",
    "Run",
    "RunDirectory",
    "RunRecord",
    "evaluate",
    "load_run",
    "results_frame",
    "results_row",
    "summarise",
]
