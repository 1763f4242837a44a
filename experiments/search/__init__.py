"""A search on one real set, and what its best find is worth on another: ``python -m experiments.search``."""
