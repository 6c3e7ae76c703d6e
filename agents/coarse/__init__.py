"""The learned coarse loop: how much the integer programme is asked for, window by window."""
