"""Many adapters over one base in a folder, with an index."""

from __future__ import annotations

from .library import Library

__all__ = ["Library"]
