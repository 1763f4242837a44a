"""Every form at an equal number of parameters."""
