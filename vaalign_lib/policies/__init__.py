"""Policies: the reference policies, how they are trained and sampled."""
