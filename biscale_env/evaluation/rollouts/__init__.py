"""One policy on one workload: scenarios, rollouts, their energy by window."""
