"""Learned policies at work: features in, a small network, an action out."""
