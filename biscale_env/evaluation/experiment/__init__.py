"""Which policies run on which workloads: scenarios, tuning, rollouts, comparisons."""
