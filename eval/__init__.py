"""What a person runs to evaluate."""
