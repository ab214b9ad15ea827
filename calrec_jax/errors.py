"""The one exception for what a user can mend."""


class CalrecError(Exception):
    """A mistake in the input, the settings or the environment.

    The message names the file, field or setting and the way out. The command
    prints it without a traceback and exits with status 1.
    """
