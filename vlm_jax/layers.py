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


#: Queries of a causal window that are worked on together: a block sees no key behind its end.
_QUERY_BLOCK = 256


def attend(
    q, k, v, mask, probe, tower: str, past=(), *, scale: float | None = None, softcap: float | None = None, causal=False
):
    """Grouped-query attention.

    Args:
        q: ``(B, S, H, d)``; k, v: ``(B, S, G, d)`` with ``H`` a multiple of ``G``.
        mask: ``(B, S, S)`` bool, True where a query (axis 1) may see a key (axis 2); None where all see all.
        probe: the sites ``attn_scores``, ``attn_probs`` ``(B, H, S, keys)`` and ``head_out`` ``(B, S, H, d)``.
        past: segments ``(k, v, mask)`` of earlier tokens, ``(B, P, G, d)`` twice and ``(B, S, P)``. They stay apart
            so that many variants of the later tokens share one copy of them.
        scale: of the scores, ``d ** -0.5`` where None; softcap: squashes scores into (-softcap, softcap).
        causal: ``mask`` lets no query see a later key.

    Returns:
        ``(B, S, H * d)``. Scores and softmax are float32.
    """
    batch, length, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    # Keys and values by head: (B, G, keys, d).
    segments = [(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), m) for k, v, m in (*past, (k, v, mask))]

    def scores_of(q, keys):
        scores = jnp.einsum("bgnd,bgtd->bgnt", q, keys, preferred_element_type=jnp.float32) * scale
        return scores if softcap is None else softcap * jnp.tanh(scores / softcap)

    if probe.meets(f"{tower}.attn_scores", f"{tower}.attn_probs"):
        out = _attend_openly(_by_head(q, k.shape[2]), segments, scores_of, (batch, heads, length), probe, tower)
    else:
        step = _QUERY_BLOCK if causal else length
        out = []
        for at in range(0, length, step):
            here, end = slice(at, at + step), min(at + step, length)
            own_k, own_v, own_mask = segments[-1]
            own_mask = None if own_mask is None else own_mask[:, here, :end]
            seen = [(k, v, m[:, here]) for k, v, m in segments[:-1]] + [
                (own_k[:, :, :end], own_v[:, :, :end], own_mask)
            ]
            out.append(_attend_closed(_by_head(q[:, here], k.shape[2]), seen, scores_of, end - at))
        out = out[0] if len(out) == 1 else jnp.concatenate(out, 1)
    out = probe(f"{tower}.head_out", out)
    return out.reshape(batch, length, heads * dim)


def _by_head(q: jax.Array, groups: int) -> jax.Array:
    """``(B, S, H, d) -> (B, G, H / G * S, d)``: one matmul per key-value head, with (heads x tokens) rows, is several
    times faster than einsum's own choice."""
    batch, length, heads, dim = q.shape
    q = q.reshape(batch, length, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
    return q.reshape(batch, groups, -1, dim)


def _by_token(out: jax.Array, length: int) -> jax.Array:
    """The inverse of :func:`_by_head`."""
    batch, groups, rows, dim = out.shape
    out = out.reshape(batch, groups, rows // length, length, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, -1, dim)


def _attend_closed(q, segments, scores_of, length: int) -> jax.Array:
    """Attention whose probabilities nobody sees: the segments' sums meet only after the values are read."""
    lowest = jnp.finfo(jnp.float32).min
    scores = []
    for keys, _, mask in segments:
        part = scores_of(q, keys)
        if mask is not None:
            open_ = part.reshape(*part.shape[:2], -1, length, part.shape[-1])
            part = jnp.where(mask[:, None, None], open_, lowest).reshape(part.shape)
        scores.append(part)
    top = functools.reduce(jnp.maximum, [part.max(-1, keepdims=True) for part in scores])
    out = total = 0
    for part, (_, values, _) in zip(scores, segments, strict=True):
        part = jnp.exp(part - jax.lax.stop_gradient(top))
        total = total + part.sum(-1, keepdims=True)
        out = out + jnp.einsum("bgnt,bgtd->bgnd", part.astype(values.dtype), values)
    return _by_token((out / total).astype(out.dtype), length)


def _attend_openly(q, segments, scores_of, shape, probe, tower: str) -> jax.Array:
    """Attention with its scores and probabilities laid out as sites."""
    length = shape[-1]

    def read(probs):
        probs = probs.reshape(*q.shape[:3], -1)
        out, at = 0, 0
        for _, values, _ in segments:
            part = probs[..., at : at + values.shape[2]].astype(values.dtype)
            out, at = out + jnp.einsum("bgnt,bgtd->bgnd", part, values), at + values.shape[2]
        return _by_token(out, length)

    scores = jnp.concatenate([scores_of(q, keys) for keys, _, _ in segments], -1).reshape(*shape, -1)
    scores = probe(f"{tower}.attn_scores", scores)
    if segments[-1][2] is not None:
        mask = jnp.concatenate([mask for _, _, mask in segments], -1)
        scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    return read(probe(f"{tower}.attn_probs", jax.nn.softmax(scores, -1), read=read))
