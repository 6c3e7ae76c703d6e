"""Independent tasks over cores or over machines: one door, :func:`workers.run_each`."""
