"""The embedded world: readable texts whose true reward is known exactly."""
