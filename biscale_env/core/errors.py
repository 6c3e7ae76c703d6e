"""The one error type that a user sees: a sentence, no traceback."""


class BiscaleError(ValueError):
    """A mistake in what was asked for.

    The message is one sentence that says what, where and what would be right.

    The command line prints it and exits with code 2.
    """


class BiscaleWarning(UserWarning):
    """What a user should know about a result, in one sentence; shown once, nothing stops."""
