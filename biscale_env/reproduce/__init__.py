"""The paper's headline experiment and a day of a cluster, each from one command."""
