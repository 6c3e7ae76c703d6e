"""Everything after a run has been simulated: metrics, statistics, the results frame, the run directory, the report."""

from biscale_env.evaluation.frame import REFERENCE_POLICY, RunRecord
from biscale_env.evaluation.metrics import results_row
from biscale_env.evaluation.results import results_frame, summarise
from biscale_env.evaluation.run import Run, load_run
from biscale_env.evaluation.rundir import RunDirectory

__all__ = [
    "REFERENCE_POLICY",
    "Run",
    "RunDirectory",
    "RunRecord",
    "load_run",
    "results_frame",
    "results_row",
    "summarise",
]
