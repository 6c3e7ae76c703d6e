"""``python -m biscale_env.cli``: the same as ``biscale``."""

from biscale_env.cli import main

main()
