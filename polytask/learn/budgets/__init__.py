"""Budgets: ways to deal out the ranks of an adapter. Each module registers some; see `polytask.learn.budget`."""
