"""The table of ``biscale evaluate --robustness``."""

import pandas as pd

from biscale_env.core.markdown import markdown_table
from biscale_env.evaluation.report.agent_table import as_agent, headed, percent, shown, target
from biscale_env.evaluation.stats.paired_windows import PairedWindows
from biscale_env.policies.policy_source import AGENT, BISCALE_OWN, STATIC_HINDSIGHT

BETWEEN = ": "  # between split and condition in the scenario's name of the results
HEAD = (
    "phase",
    "split",
    "condition",
    "max clock",
    "best static (hindsight)",
    "BiScale's own",
    "agent",
    "agent - own, points",
)


def robustness_markdown(results: pd.DataFrame, windows: pd.DataFrame, judged: str = AGENT) -> str:
    """One row per phase, split and condition.

    Max clock, best static in hindsight, BiScale's own, the agent and the paired difference.

    Args:
        results: completed results frame.
        windows: totals per run and window of time (``Run.windows``).
        judged: label of the policy that the table is about.
    """
    results = as_agent(results, judged)
    lines = []
    for (phase, scenario), rows in results.groupby(["phase", "scenario"], sort=False):
        split, _, name = str(scenario).partition(BETWEEN)
        own = BISCALE_OWN[str(phase)]
        policies = ("max", STATIC_HINDSIGHT, own, AGENT)
        parts = {policy: rows[rows["policy"] == policy] for policy in policies}
        if parts[AGENT].empty:  # a run that was broken off
            continue
        point = PairedWindows(rows, windows)
        cells = [str(shown(parts[policy], target(rows), point) or "-") for policy in policies]
        difference = point.energy_difference(parts[AGENT], parts[own])
        cells.append(percent(difference))
        lines.append([str(phase), split, name, *cells])
    return markdown_table(headed(HEAD, judged), lines, "lllr") + "\n"
