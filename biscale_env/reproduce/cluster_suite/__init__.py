"""Tiers ``cluster`` and ``multi`` of BiScale-Bench: placements of windows, clocks of instances."""
