"""The exceptions that the command puts into words."""


class CalrecError(Exception):
    """A mistake in the input, the settings or the environment.

    The message names the file, field or setting and the way out. The command
    prints it without a traceback and exits with status 1.
    """


class Stopped(Exception):
    """The process was asked to end, and what it did is saved. The command prints the message and exits with 0."""
