"""The project's one rule of tuning, and curves at equal attainment."""
