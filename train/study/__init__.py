"""P0's study: every placement, model and seed, compared."""
