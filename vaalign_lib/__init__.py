"""Uncertainty-aware alignment: the helper library underneath the notebooks of the study."""
