"""Products of arrays, which add up in float32 whatever the arrays' precision."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.typing import Array, ArrayLike


def product(spec: str, x: ArrayLike, y: ArrayLike, dtype: Any = None) -> Array:
    """The einsum of two arrays.

    Terms of bfloat16 or float16 are added in float32, and the sum is rounded once. Matrix units of CPUs, GPUs and TPUs
    are made for this; a product whose sum also has 16 bits is several times slower on a CPU. Its gradients are such
    products too: the incoming gradient is rounded to the precision of the arrays first.

    Args:
        spec: as in :func:`jax.numpy.einsum`, with names for all axes. Each axis of an array must be in the other one
            or in the result.
        dtype: of the result; by default that of the arrays.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.dtype != y.dtype or x.dtype.itemsize != 2:
        out = jnp.einsum(spec, x, y)
        return out if dtype is None else out.astype(dtype)
    return _narrow(spec, jnp.dtype(dtype or x.dtype), x, y)


def _summed(spec: str, dtype: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(dtype)


#: JAX's own gradient would multiply a float32 gradient with a 16-bit array, for which it widens the array.
_narrow = partial(jax.custom_vjp, nondiff_argnums=(0, 1))(_summed)


def _forward(spec: str, dtype: Any, x: Any, y: Any) -> tuple[jax.Array, tuple]:
    # An array is kept only for the gradient of the other one. Frozen weights have none, so their inputs are not kept.
    kept = x.value if y.perturbed else None, y.value if x.perturbed else None
    return _summed(spec, dtype, x.value, y.value), kept


def _backward(spec: str, dtype: Any, kept: tuple, gradient: Any) -> tuple:
    if isinstance(gradient, jax.custom_derivatives.SymbolicZero):
        return None, None
    x, y = kept
    names, out = spec.split("->")
    of_x, of_y = names.split(",")

    def towards(other: jax.Array | None, inputs: str, outputs: str) -> jax.Array | None:
        if other is None:
            return None
        return _summed(f"{out},{inputs}->{outputs}", other.dtype, gradient.astype(other.dtype), other)

    return towards(y, of_y, of_x), towards(x, of_x, of_y)


_narrow.defvjp(_forward, _backward, symbolic_zeros=True)
