"""Stacked layers of bfloat16 in a loop, without a second copy of all of them in float32.

On a CPU, XLA slices a bfloat16 array by widening it first. If a loop slices a stack of layers, XLA widens the whole
stack once, before the loop, which takes twice the memory of the weights. Here the widening depends on the loop's index,
so it stays in the loop and becomes one with the slice.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int

from vlm_jax.typing import ArrayLike


def layer_at(stack: Any, index: Int[ArrayLike, ""]) -> Any:
    """A layer of ``stack``, a pytree of arrays with a leading axis of layers, in the body of a loop over ``index``."""
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(_kept(array, index), index, keepdims=False), stack)


def scanned_layer(sliced: Any, stack: Any, index: Int[ArrayLike, ""]) -> Any:
    """The same where a scan has sliced the layer: its bfloat16 arrays are read by :func:`layer_at` instead.

    A gradient goes to ``sliced``, because a scan stacks the gradients of what it slices, layer by layer.
    """
    if jax.default_backend() != "cpu":
        return sliced

    def of(sliced, array):
        return sliced if array.dtype != jnp.bfloat16 else _instead(layer_at(array, index), sliced)

    return jax.tree.map(of, sliced, jax.lax.stop_gradient(stack))


def _kept(array: jax.Array, index: Int[ArrayLike, ""]) -> jax.Array:
    """The array, in a form that XLA cannot widen before the loop."""
    if array.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
        return array
    return jax.lax.optimization_barrier((array, index))[0]


@jax.custom_vjp
def _instead(value: jax.Array, sliced: jax.Array) -> jax.Array:
    """``value``, with the gradient of ``sliced``, which is equal to it and is not computed."""
    return value


_instead.defvjp(lambda value, sliced: (value, None), lambda _, gradient: (None, gradient))
