"""Tier 1: capacity tables and the integer programme."""
