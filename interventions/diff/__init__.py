"""P2: stage-wise model diffing with sparse dictionaries, from activations to features, heads and ablations."""
