"""The one error type that a user sees: a sentence, no traceback."""


class BiscaleError(ValueError):
    """A mistake in what was asked for.

    The message is one sentence that says what, where and what would be right.

    The command line prints it and exits with code 2.
    """


class OptionError(BiscaleError, TypeError):
    """A keyword that an environment does not have.

    Libraries try keywords and go on without them after a ``TypeError``: Stable-Baselines3 asks for
    ``render_mode``, TorchRL for ``frameskip`` (and looks for "unexpected keyword argument").
    """


class BiscaleWarning(UserWarning):
    """What a user should know about a result, in one sentence; shown once, nothing stops."""
