"""The few building blocks that towers and decoder share: linear, norms, embedding, activations, rotary, attention."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


def _normal(key: jax.Array, shape: tuple[int, ...], scale: float = 0.02) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(key, shape))


class Linear(nnx.Module):
    """``x @ kernel + bias``; the kernel is ``(in, out)``, the transpose of the Hugging Face weight."""

    def __init__(self, key: jax.Array, inputs: int, outputs: int, bias: bool = False):
        self.kernel = _normal(key, (inputs, outputs))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        # On CPU the gradient of a flat matmul is several times faster than that of a batched one.
        y = (x.reshape(-1, x.shape[-1]) @ self.kernel[...]).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """A table ``(rows, features)``."""

    def __init__(self, key: jax.Array, rows: int, features: int):
        self.weight = _normal(key, (rows, features))

    def __call__(self, index: jax.Array) -> jax.Array:
        return self.weight[...][index]


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32; it scales by ``1 + weight`` where ``unit_offset`` (Gemma)."""

    def __init__(self, features: int, eps: float, unit_offset: bool = False):
        self.weight = nnx.Param(jnp.zeros(features) if unit_offset else jnp.ones(features))
        self.eps, self.unit_offset = eps, unit_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        if self.unit_offset:  # Gemma multiplies before it rounds to the activations' precision, Llama after
            return ((1 + self.weight[...].astype(jnp.float32)) * y).astype(x.dtype)
        return self.weight[...] * y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with scale and shift, computed in float32."""

    def __init__(self, features: int, eps: float = 1e-6):
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        return (self.weight[...] * y + self.bias[...]).astype(x.dtype)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


#: ``hidden_act`` -> function. "gelu" is the exact one, as in transformers; jax's own default is the tanh one.
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": _quick_gelu,
}


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of ``x (B, S, H, d)`` by ``cos, sin (B, S, d)``, halves paired as in Llama, in float32."""
    y = x.astype(jnp.float32)
    left, right = jnp.split(y, 2, -1)
    turned = jnp.concatenate([-right, left], -1)
    return (y * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)


def attend(q, k, v, mask, probe, tower: str, past=None, *, scale: float | None = None, softcap: float | None = None):
    """Grouped-query attention.

    Args:
        q: ``(B, S, H, d)``; k, v: ``(B, S, G, d)`` with ``H`` a multiple of ``G``.
        mask: ``(B, S, S)`` bool, True where a query (axis 1) may see a key (axis 2); None where all see all.
        probe: the sites ``attn_scores``, ``attn_probs`` ``(B, H, S, keys)`` and ``head_out`` ``(B, S, H, d)``.
        past: ``(k, v, mask)`` of earlier tokens, ``(B, P, G, d)`` twice and ``(B, S, P)``. They stay apart from
            ``k`` and ``v`` so that many variants of the later tokens share one copy of them.
        scale: of the scores, ``d ** -0.5`` where None; softcap: squashes scores into (-softcap, softcap).

    Returns:
        ``(B, S, H * d)``. Scores and softmax are float32.
    """
    batch, length, heads, dim = q.shape
    groups = k.shape[2]
    repeats = heads // groups
    scale = dim**-0.5 if scale is None else scale
    # One matmul per key-value head, with (repeats x tokens) rows: several times faster than einsum's own choice.
    grouped = q.reshape(batch, length, groups, repeats, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, groups, repeats * length, dim)

    def scores_for(keys):
        scores = jnp.einsum("bgnd,bgtd->bgnt", grouped, keys.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32)
        return scores.reshape(batch, heads, length, -1) * scale

    def read(probs, values):
        probs = probs.reshape(batch, groups, repeats * length, -1).astype(values.dtype)
        out = jnp.einsum("bgnt,bgtd->bgnd", probs, values.transpose(0, 2, 1, 3))
        return out.reshape(batch, heads, length, dim).transpose(0, 2, 1, 3)

    scores = scores_for(k)
    if past is not None:
        past_k, past_v, past_mask = past
        scores = jnp.concatenate([scores_for(past_k), scores], -1)
        mask = jnp.concatenate([past_mask, mask], -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = probe(f"{tower}.attn_scores", scores)
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, -1)
    probs = probe(f"{tower}.attn_probs", probs)
    if past is None:
        out = read(probs, v)
    else:
        split = past_k.shape[1]
        out = read(probs[..., :split], past_v) + read(probs[..., split:], v)
    out = probe(f"{tower}.head_out", out)
    return out.reshape(batch, length, heads * dim)
