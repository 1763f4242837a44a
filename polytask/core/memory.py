"""What is said when a batch does not fit into memory: the same in learning, evaluation and comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import MemoryLimitError


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. PyTorch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


@contextmanager
def memory_advice(device: torch.device, rows: int, more: str = "") -> Iterator[None]:
    """Turns what an allocator raises inside the block into advice; other errors pass as they are.

    Args:
        device: whose memory it is.
        rows: how many rows or sequences the batch had.
        more: what else the caller offers, after "lower batch_size".

    Raises:
        MemoryLimitError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        batch = f"a batch of {rows}" if rows > 1 else "a single row"
        lower = "lower batch_size (--batch-size)" if rows > 1 else "batch_size (--batch-size) cannot be lowered further"
        raise MemoryLimitError(
            f"{batch} does not fit into the memory of {device}; {lower}{more}, or use a smaller base or a device with "
            "more memory"
        ) from error
