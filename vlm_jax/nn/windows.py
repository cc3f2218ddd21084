"""Attention inside windows of a picture, at the cost of windows: each query meets only keys near its own window."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float, Int

from vlm_jax.nn.layers import attend
from vlm_jax.sites import NO_TAPS, Context, Probe
from vlm_jax.typing import Array, ArrayLike

#: Queries of a block, in the order of windows. A block meets its own patches and one window more on both sides.
_BLOCK = 256


class Windows(NamedTuple):
    """The patches of pictures sorted by window.

    order: the patches in that order; padding comes last.
    place: where each patch is in it, the inverse of ``order``.
    number: the window of every patch in that order; -1 for padding.
    largest: no window has more patches.
    """

    order: Int[Array, "images patches"]
    place: Int[Array, "images patches"]
    number: Int[Array, "images patches"]
    largest: int

    @classmethod
    def of(cls, number: Int[ArrayLike, "images patches"], largest: int) -> "Windows":
        """From the window of every patch; -1 for padding."""
        number = jnp.asarray(number)
        order = jnp.argsort(jnp.where(number < 0, jnp.iinfo(number.dtype).max, number), 1)
        return cls(order, jnp.argsort(order, 1), jnp.take_along_axis(number, order, 1), largest)


def attend_in_windows(
    q: Float[ArrayLike, "images patches heads head_dim"],
    k: Float[ArrayLike, "images patches heads head_dim"],
    v: Float[ArrayLike, "images patches heads head_dim"],
    windows: Windows,
) -> Float[Array, "images patches heads*head_dim"]:
    """Attention in which a patch sees the patches of its own window. What padding reads is undefined.

    The same as :func:`vlm_jax.nn.layers.attend` with a mask of windows. In the order of windows, all patches that a
    block of queries sees are next to it, so the work grows with the patches and not with their square.
    """
    images, patches, heads, dim = q.shape
    count = -(-patches // _BLOCK)
    near = windows.largest - 1  # the farthest patch of the same window
    rows = jnp.arange(count)[:, None] * _BLOCK
    queries = rows + jnp.arange(_BLOCK)
    keys = rows + jnp.arange(_BLOCK + 2 * near)  # in arrays that begin ``near`` patches earlier

    def in_blocks(x, before: int, index):
        x = jnp.take_along_axis(x, windows.order[:, :, None, None], 1)
        x = jnp.pad(x, ((0, 0), (before, count * _BLOCK - patches + before), (0, 0), (0, 0)))
        return x[:, index].reshape(images * count, -1, heads, dim)

    padding = count * _BLOCK - patches
    own = jnp.pad(windows.number, ((0, 0), (0, padding)), constant_values=-1)[:, queries]
    other = jnp.pad(windows.number, ((0, 0), (near, padding + near)), constant_values=-1)[:, keys]
    mask = (own[..., None] == other[..., None, :]).reshape(images * count, _BLOCK, -1)
    out = attend(
        in_blocks(q, 0, queries),
        in_blocks(k, near, keys),
        in_blocks(v, near, keys),
        mask,
        Probe((), NO_TAPS, Context()),
        "visual",
    )
    out = out.reshape(images, count * _BLOCK, heads * dim)
    return jnp.take_along_axis(out, windows.place[:, :, None], 1)
