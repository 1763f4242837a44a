"""Ways to weigh adapters: one file per method."""
