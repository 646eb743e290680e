"""Policies over finitely many arms, the theorems, and their simulations."""
