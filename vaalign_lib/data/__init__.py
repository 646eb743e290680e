"""Preference pairs, prompts, people's ratings, and the embedded world."""
