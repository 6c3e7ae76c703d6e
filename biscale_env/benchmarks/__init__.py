"""Speed figures, each with the target it is held against."""
