"""Latency and power of iterations measured on this machine's GPU."""
