"""Attention by a kernel that never stores the scores: TPU's splash attention, for plain causal masks."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float

from vlm_jax.mesh.sharding import free_axes, spec_of
from vlm_jax.typing import Array, ArrayLike

#: The most queries and keys in a block of the kernel. Block sizes and sequence lengths are multiples of ``_LANES``.
_BLOCK, _LANES = 512, 128


def causal_attention(
    q: Float[ArrayLike, "batch tokens heads head_dim"],
    k: Float[ArrayLike, "batch tokens groups head_dim"],
    v: Float[ArrayLike, "batch tokens groups head_dim"],
    real: Bool[ArrayLike, "batch tokens"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Grouped-query attention in which a token sees itself and the real tokens before it.

    Scores and softmax are float32. The kernel runs on TPUs; elsewhere it is interpreted, which is slow and meant for
    tests. On a mesh each device computes its part of the rows and of the heads.

    Args:
        real: False for padding, which no real token sees. The results at padding are meaningless.
        scale: factor of the scores.
        softcap: squashes the scores into (-softcap, softcap); None leaves them.
    """
    length = q.shape[1]
    padding = -length % _LANES

    def padded(x):
        return jnp.pad(x, [(0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)])

    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v, real = (padded(x) for x in (q, k, v, real))
    axes = free_axes()
    heads = spec_of(k.shape, ("batch", None, "heads", None), axes)
    rows = PartitionSpec(*heads[:2])

    def local(q, k, v, real):
        def run(interpret: bool):
            kernel = _kernel(q.shape[2], q.shape[1], softcap, interpret)
            segments = real.astype(jnp.int32)
            by_head = (x.swapaxes(1, 2) for x in (q, k, v))
            return _precise(*by_head, segments, kernel).swapaxes(1, 2)

        return jax.lax.platform_dependent(tpu=lambda: run(False), default=lambda: run(True))

    if any(size > 1 for size in axes.values()):
        local = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return local(q, k, v, real)[:, :length]


def _splash():
    """The module of the kernel. It takes a moment to import, and few need it."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention


def _batched(q, k, v, segments, kernel):
    splash = _splash()
    return jax.vmap(kernel)(q, k, v, segment_ids=splash.SegmentIds(segments, segments))


def _precision(dtype):
    """bfloat16 products are exact in the kernel's float32 sums, and with a higher precision it does not compile."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


@jax.custom_vjp
def _precise(q, k, v, segments, kernel):
    """The kernel on a batch, with the highest precision that it compiles with, in the backward pass too."""
    with _precision(q.dtype):
        return _batched(q, k, v, segments, kernel)


def _forwards(q, k, v, segments, kernel):
    with _precision(q.dtype):
        return jax.vjp(_batched, q, k, v, segments, kernel)


def _backwards(pullback, gradient):
    with _precision(gradient.dtype):
        return pullback(gradient)


_precise.defvjp(_forwards, _backwards)


def _kernel(heads: int, length: int, softcap: float | None, interpret: bool):
    splash = _splash()
    block = max(size for size in range(_LANES, _BLOCK + 1, _LANES) if length % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    block_sizes = splash.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    return splash.make_splash_mha(
        mask,
        head_shards=1,
        q_seq_shards=1,
        block_sizes=block_sizes,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
