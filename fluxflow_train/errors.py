"""The exceptions that end a command with a line for the person at the keyboard instead of a traceback."""

EXIT_STOPPED = 85  # stopped when asked to, everything saved: the same command goes on from here


class UserError(ValueError):
    """Something the user can put right.

    The message is one line: what is wrong, then what to do. Commands print it without a traceback and exit with 1.
    """


class Stopped(Exception):
    """A signal or the clock asked the command to end, and nothing was lost. Commands exit with `EXIT_STOPPED`."""
