"""Peak memory of a piece of work."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Peak:
    """What `peak_memory` found, in MB (10^6 bytes)."""

    mb: float | None = None


@contextmanager
def peak_memory(device: torch.device, every: float = 0.02) -> Iterator[Peak]:
    """The most memory in use inside the block.

    On a GPU what torch allocated; on a CPU the process's resident memory, looked at every ``every`` seconds (None where the
    system does not tell). The latter counts the whole process: compare runs in processes of their own.
    """
    found = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.mb = torch.cuda.max_memory_allocated(device) / 1e6
        return
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield found
        return
    page = os.sysconf("SC_PAGESIZE")
    stop = threading.Event()
    highest = 0

    def look() -> None:
        nonlocal highest
        highest = max(highest, int(statm.read_text().split()[1]) * page)

    def watch() -> None:
        while not stop.wait(every):
            look()

    look()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()
        look()
        found.mb = highest / 1e6
