"""From measurements to coefficients.

Evidence, profile tables, fits of latency and power, validation.
"""
