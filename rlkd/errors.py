"""The one exception class that means: the user can mend this."""

import difflib
from collections.abc import Iterable

SIMILAR = 0.7  # of `difflib`: names that differ by a slip or two; below it a hint is a guess
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


class GoalError(UserError):
    """No student can meet the goal: what was prepared for the run has no further use."""


def closest(given: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean ...?" for the name that is nearly what was given, or nothing."""
    match = difflib.get_close_matches(given, list(allowed), n=1, cutoff=SIMILAR)
    return f"; did you mean {match[0]}?" if match else ""
