"""Training: the loop, what it optimises, and the commands that train models, adapters and whole studies."""
