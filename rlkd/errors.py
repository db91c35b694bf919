"""The one exception class that means: the user can mend this."""

LONGEST = 1000  # characters of a message: what a file says of itself may be as long as the file


class UserError(Exception):
    """A mistake of the user's. The message is one line: what was given, what is allowed, what to do.

    A longer one than LONGEST loses its middle. The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        half = LONGEST // 2 - 10
        super().__init__(message if len(message) <= LONGEST else f"{message[:half]} ... {message[-half:]}")


class WriteError(UserError):
    """A file could not be written. The run can be resumed after the cause is removed."""
