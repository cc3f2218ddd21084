"""P4: where representation editors sit."""
