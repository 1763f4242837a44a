"""Where an adapter starts from, compared on real data; ``python -m experiments.starts``."""
