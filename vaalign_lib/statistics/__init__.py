"""Tests, intervals and variance decompositions, on arrays."""
