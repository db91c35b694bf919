"""Standard output and standard error: a failure to write one of them names it, and not the run's folder."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rlkd.errors import UserError

OUTPUT, ERROR = "standard output", "standard error"


class NamedStream:
    """A text stream whose failures carry the stream's name; characters that it cannot encode are escaped."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        """Write `text` and return its length."""
        with self._naming():
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        with self._naming():
            self._stream.flush()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._name) from error  # of the class that the number stands for

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def named_streams() -> Iterator[None]:
    """Let failures to write standard output and standard error carry these names inside the block.

    Raises:
        UserError: standard output is closed.
        OSError: standard output cannot be written at the end of the block; `filename` is its name.
    """
    if sys.stdout is None:
        raise UserError(f"{OUTPUT} is closed; redirect it to a file or to {os.devnull}")
    output, error = sys.stdout, sys.stderr
    sys.stdout = NamedStream(output, OUTPUT)
    if error is not None:
        sys.stderr = NamedStream(error, ERROR)
    try:
        yield
        sys.stdout.flush()
    except OSError as failure:
        if failure.filename in (OUTPUT, ERROR):
            _abandon(output if failure.filename == OUTPUT else error)
        raise
    finally:
        sys.stdout, sys.stderr = output, error


def _abandon(stream: TextIO) -> None:
    """Send what is left to nowhere: the interpreter would try to write it once more at its end, and complain."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def complain(text: str) -> None:
    """Print a line to standard error, if it is there and can be written."""
    if sys.stderr is None:
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _abandon(sys.stderr)


def print_error(text: str) -> None:
    """Print a line to standard error, if it is there.

    Raises:
        OSError: it cannot be written.
    """
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


class MessageHandler(logging.Handler):
    """Print log records as plain lines; a line that cannot be written raises, and so ends the command."""

    def __init__(self) -> None:
        super().__init__()
        self.print_line: Callable[[str], None] = print_error  # a progress bar replaces it while it is shown

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record's message."""
        self.print_line(self.format(record))


HANDLER = MessageHandler()


@contextlib.contextmanager
def shown_messages() -> Iterator[None]:
    """Show what rlkd's loggers report, from INFO on, inside the block, and hand none of it to other handlers."""
    logger = logging.getLogger("rlkd")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(HANDLER)
    try:
        yield
    finally:
        logger.removeHandler(HANDLER)
        logger.setLevel(level)
        logger.propagate = propagate
