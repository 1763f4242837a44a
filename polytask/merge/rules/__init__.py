"""Rules that make one tensor of several: one file per family."""
