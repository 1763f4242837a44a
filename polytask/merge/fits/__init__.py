"""Merge methods that look at data; each module registers some. See `polytask.merge.fit`."""
