"""P0: which modules matter, and LoRA placed in them."""
