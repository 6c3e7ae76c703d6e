"""Compiled, event-driven dynamics of one prefill and one decode instance."""
