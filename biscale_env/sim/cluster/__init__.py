"""Compiled event loops of a cluster: disaggregated and co-located."""
