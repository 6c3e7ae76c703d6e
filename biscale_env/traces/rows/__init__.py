"""Files of every make, as rows of raw columns."""
