"""Stacks of policies, how they write, and what they start from."""
