"""The one exception for a user's mistake."""


class InputError(ValueError):
    """Bad arguments or bad input: one line that says what, where, the offending value, and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """
