"""Merge methods on real data; see `__main__`."""
