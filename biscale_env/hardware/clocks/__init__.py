"""Clocks of real and fake GPUs: backends, owners, latencies, the doctor."""
