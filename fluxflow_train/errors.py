"""The one exception whose text is meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user can put right.

    The message is one line: what is wrong, then what to do. Commands print it without a traceback and exit with 1.
    """
