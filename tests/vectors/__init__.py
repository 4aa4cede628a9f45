"""Known-answer vectors, and the scripts that make them."""
