"""Layers of bfloat16 that a loop reads one at a time: the same gradients, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from vlm_jax.nn import decoder
from vlm_jax.nn.stacks import scanned_layer
from vlm_jax.nn.visibility import Tokens


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("layers", [(0, None), (1, 3)])
def test_gradients_are_those_of_sliced_layers(monkeypatch, remat, layers):
    """Exactly; where the layers are not all of the model's, too."""
    model, _ = vlm_jax.load("mini-llava", dtype="bfloat16")
    x = jax.random.normal(jax.random.key(0), (2, 6, model.config.text.hidden_size), jnp.bfloat16)
    tokens = Tokens(jnp.ones((2, 6), bool))
    window = model.text.window(tokens, jnp.broadcast_to(jnp.arange(6), (3, 2, 6)))

    def gradients():
        def loss(text):
            out, _, _ = text.scan(x, window, layers=layers, remat=remat)
            return (out.astype(jnp.float32) ** 2).mean()

        return jax.tree.leaves(jax.jit(jax.grad(loss))(model.text))

    ours = gradients()
    assert any(np.asarray(leaf, np.float32).any() for leaf in ours)
    monkeypatch.setattr(decoder, "scanned_layer", lambda sliced, *_: sliced)
    monkeypatch.setattr(decoder, "layer_at", lambda stack, at: jax.tree.map(lambda array: array[at], stack))
    for one, other in zip(ours, gradients(), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_the_stack_is_not_widened():
    """The compiled program's own account: less than half of what a copy in float32 would take."""
    stack = jax.ShapeDtypeStruct((32, 256, 256), jnp.bfloat16)

    def run(stack, x):
        def body(x, scanned):
            at, layer = scanned
            return jnp.tanh(x @ scanned_layer({"kernel": layer}, {"kernel": stack}, at)["kernel"]), None

        return jax.lax.scan(body, x, (jnp.arange(32), stack))[0]

    compiled = jax.jit(run).lower(stack, jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 256 * 256 * 2
