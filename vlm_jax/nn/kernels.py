"""Attention by a kernel that never lays the scores out: TPU's splash attention, where the mask allows it."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from vlm_jax.mesh.sharding import free_axes, spec_of

#: Queries and keys that the kernel works on together; its lengths are multiples of the smaller one.
_BLOCK, _LANES = 512, 128


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array, scale: float, softcap: float | None):
    """Grouped-query attention of ``q (B, S, H, d)``, ``k, v (B, S, G, d)`` in which a token sees itself and the real
    tokens before it, ``real (B, S)`` bool: ``(B, S, H, d)``. What padding reads means nothing.

    On a TPU the kernel, elsewhere the same one interpreted (slowly: for tests). On a mesh every device has its own rows
    and heads. Scores and softmax are float32.
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


def _batched(q, k, v, segments, kernel):
    return jax.vmap(kernel)(q, k, v, segment_ids=splash.SegmentIds(segments, segments))


def _precision(dtype):
    """Products of bfloat16 are exact in the kernel's float32 sums; asked for more it does not compile."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


@jax.custom_vjp
def _precise(q, k, v, segments, kernel):
    """The kernel on a batch, with as precise products as it takes, backwards too."""
    with _precision(q.dtype):
        return _batched(q, k, v, segments, kernel)


def _forwards(q, k, v, segments, kernel):
    with _precision(q.dtype):
        return jax.vjp(_batched, q, k, v, segments, kernel)


def _backwards(back, gradient):
    with _precision(gradient.dtype):
        return back(gradient)


_precise.defvjp(_forwards, _backwards)


def _kernel(heads: int, length: int, softcap: float | None, interpret: bool):
    block = max(size for size in range(_LANES, _BLOCK + 1, _LANES) if length % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    return splash.make_splash_mha(
        mask,
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
