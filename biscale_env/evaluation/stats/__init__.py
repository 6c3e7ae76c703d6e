"""Metrics of a run, intervals over runs, targets and scores."""
