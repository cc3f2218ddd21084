"""P0: causal tracing."""
