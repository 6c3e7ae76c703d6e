"""BiScale's decode controller."""
