"""What every package uses and none owns: the user's error, compilation of kernels."""
