"""The cluster as an environment: settings, state, windows, many agents."""
