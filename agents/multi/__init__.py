"""Clocks of many instances, one network per phase shared by all of them, learned in the cluster."""
