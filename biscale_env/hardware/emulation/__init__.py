"""An engine without a GPU, in real time."""
