"""Sources of rewards and their variance (Algorithms 6 to 9)."""
