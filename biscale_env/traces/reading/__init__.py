"""From raw columns to a trace: what a file is, its units, arrivals."""
