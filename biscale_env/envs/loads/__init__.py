"""Workloads of episodes, and the capacity that loads refer to."""
