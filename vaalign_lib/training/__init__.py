"""How policies are improved and evaluated."""
