"""Generated workloads: profiles of lengths and arrivals, sampled deterministically."""
