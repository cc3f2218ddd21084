"""P2: what fine-tuning on pictures makes of a text model's features, on models whose truth is known."""
