"""Runs in the browser: scrub through a finished one, follow training or a replay while it goes."""
