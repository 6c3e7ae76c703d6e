"""Commands of GPUs and engines: ``biscale hw``, ``replay``, ``validate`` and ``profile``."""
