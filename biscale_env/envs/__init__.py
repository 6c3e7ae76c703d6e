"""Gymnasium environments of the prefill and decode loops."""
