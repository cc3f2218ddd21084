"""The loss and gradients that a training step computes, for tests that compare them."""

import jax


def value_and_grad(loss):
    """``(trained, rest, batch, key)`` -> the loss, and its gradients by path."""

    def run(trained, rest, batch, key):
        return jax.value_and_grad(lambda leaves: loss(rest.joined(leaves), batch, key))(trained)

    return run
