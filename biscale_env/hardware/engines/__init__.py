"""What serving engines tell: records, hooks, metric sources."""
