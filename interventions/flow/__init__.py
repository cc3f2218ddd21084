"""P1: how visual information flows to text."""
