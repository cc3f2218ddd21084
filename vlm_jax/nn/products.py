"""Products that add up in float32 whatever the precision of the arrays: of 16 bits, or bfloat16 with float32."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.typing import Array, ArrayLike

#: Three bfloat16 numbers of 8 significant bits make one float32 number of 24.
_PARTS = 3


def product(spec: str, x: ArrayLike, y: ArrayLike, dtype: Any = None) -> Array:
    """The einsum of two arrays.

    Terms are added in float32, and the sum is rounded once. Matrix units of CPUs, GPUs and TPUs are made for this; a
    product of bfloat16 arrays whose sum is bfloat16 too is several times slower on a CPU. If one array is float32 and
    the other bfloat16, the product is that of float32 arrays; where there are matrix units for bfloat16, it needs no
    float32 copy of the other array, and numbers that bfloat16 cannot reach (infinite, or above 3.38e38) give NaN.

    Gradients with bfloat16 arrays are such products too; between two of them, the incoming gradient is rounded to
    bfloat16 first. They have a reverse mode only: jax.jvp refuses them.

    Args:
        spec: as in :func:`jax.numpy.einsum`, with names for all axes. Each axis of an array must be in the other one
            or in the result.
        dtype: of the result; by default the more precise one of the arrays.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    dtypes = {x.dtype, y.dtype}
    out = jnp.dtype(dtype or jnp.result_type(x, y))
    narrow, wide = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    if dtypes in ({narrow}, {narrow, wide}):
        return _product(spec, out, x, y)
    # In float16 an incoming gradient that is rounded could become 0 or infinite, so its gradients are JAX's own.
    total = wide if dtypes == {jnp.dtype(jnp.float16)} else None
    return jnp.einsum(spec, x, y, preferred_element_type=total).astype(out)


@functools.cache
def has_matrix_units() -> bool:
    """Whether the CPU multiplies bfloat16 numbers several times faster than float32 ones, as accelerators do."""
    facts = Path("/proc/cpuinfo")
    return facts.is_file() and "amx_bf16" in facts.read_text()


def _summed(spec: str, dtype: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    add = functools.partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
    if x.dtype == y.dtype:
        return add(x, y).astype(dtype)

    def widened(x: jax.Array, y: jax.Array) -> jax.Array:
        return add(x.astype(jnp.float32), y.astype(jnp.float32)).astype(dtype)

    def by_parts(x: jax.Array, y: jax.Array) -> jax.Array:
        pairs = list(itertools.product(_parts(x), _parts(y)))
        return sum(add(*pair) for pair in reversed(pairs)).astype(dtype)  # the smallest first: they are not lost

    # The choice is made for the machine that the program is compiled for, which need not be this one.
    return jax.lax.platform_dependent(x, y, cpu=by_parts if has_matrix_units() else widened, default=by_parts)


def _parts(x: jax.Array) -> list[jax.Array]:
    """bfloat16 arrays whose sum is x, the largest first."""
    if x.dtype == jnp.bfloat16:
        return [x]
    found = []
    for _ in range(_PARTS):
        # Not by a cast there and back, which XLA leaves out on GPUs: the other parts would be 0.
        rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        found.append(rounded.astype(jnp.bfloat16))
        x = x - rounded
    return found


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Dtypes:
    """The precisions of two arrays."""

    x: Any
    y: Any


#: JAX's own gradient of a product with a float32 sum would widen the arrays.
_product = functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))(_summed)


def _forward(spec: str, dtype: Any, x: Any, y: Any) -> tuple[jax.Array, tuple]:
    # An array is kept only for the gradient of the other one. Frozen weights have none, so their inputs are not kept.
    kept = x.value if y.perturbed else None, y.value if x.perturbed else None
    return _summed(spec, dtype, x.value, y.value), (*kept, _Dtypes(x.value.dtype, y.value.dtype))


def _backward(spec: str, dtype: Any, kept: tuple, gradient: Any) -> tuple:
    if isinstance(gradient, jax.custom_derivatives.SymbolicZero):
        return None, None
    x, y, dtypes = kept
    names, out = spec.split("->")
    of_x, of_y = names.split(",")
    gradient = gradient.astype(jnp.promote_types(dtypes.x, dtypes.y))

    def towards(other: jax.Array | None, inputs: str, outputs: str, dtype: Any) -> jax.Array | None:
        return None if other is None else _summed(f"{out},{inputs}->{outputs}", dtype, gradient, other)

    return towards(y, of_y, of_x, dtypes.x), towards(x, of_x, of_y, dtypes.y)


_product.defvjp(_forward, _backward, symbolic_zeros=True)
