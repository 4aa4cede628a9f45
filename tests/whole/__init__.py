"""Both processes together."""
