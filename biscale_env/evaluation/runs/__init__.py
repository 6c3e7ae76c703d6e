"""Records of runs and the directory that keeps them."""
