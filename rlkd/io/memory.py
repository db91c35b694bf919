"""Turn running out of memory, on a processor or a GPU, into one line with the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlkd.errors import UserError


@contextmanager
def enough_memory(work: str, remedy: str) -> Iterator[None]:
    """Turn every way of running out of memory inside the block into a UserError; other errors pass.

    Args:
        work: what needs the memory.
        remedy: what the user can do.

    Raises:
        UserError: the memory was too small.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in words:
            raise
        reason = " ".join(words.split())[:100]
        raise UserError(f"not enough memory for {work} ({reason}); {remedy}") from error
