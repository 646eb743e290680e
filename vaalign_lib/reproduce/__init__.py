"""Executing the notebooks, planning and reporting."""
