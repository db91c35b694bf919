"""The one exception class that means: the user can mend this."""


class UserError(Exception):
    """A mistake of the user's. The message is one line: what was given, what is allowed, what to do.

    The command line prints it without a traceback and exits with code 2.
    """
