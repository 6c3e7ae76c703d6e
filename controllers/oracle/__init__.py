"""The hindsight optimum of both phases and bounds on it."""
