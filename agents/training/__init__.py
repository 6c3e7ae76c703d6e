"""Training runs: environments, algorithms, callbacks, held-out evaluation, studies."""
