"""The few building blocks that towers and decoder share: linear, norms, embedding, activations, rotary, attention."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.nn.kernels import causal_attention


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
    q,
    k,
    v,
    mask,
    probe,
    tower: str,
    past=(),
    *,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    kernel: bool = False,
):
    """Grouped-query attention.

    Args:
        q: ``(B, S, H, d)``; k, v: ``(B, S, G, d)`` with ``H`` a multiple of ``G``.
        mask: ``(B, S, S)`` bool, True where a query (axis 1) may see a key (axis 2); None where all see all.
        probe: the sites ``attn_scores``, ``attn_probs`` ``(B, H, S, keys)`` and ``head_out`` ``(B, S, H, d)``.
        past: segments ``(k, v, mask)`` of earlier tokens, ``(b, P, G, d)`` twice and ``(b, S, P)``, where ``b`` divides
            ``B``: row ``i`` has the past ``i // (B / b)``. So many variants of the later tokens share one copy of it.
        scale: of the scores, ``d ** -0.5`` where None; softcap: squashes scores into (-softcap, softcap).
        causal: ``mask`` lets no query see a later key.
        kernel: ``mask`` is that of :func:`vlm_jax.nn.kernels.causal_attention`, which may be used: where there is no
            past and no intervention meets scores or probabilities.

    Returns:
        ``(B, S, H * d)``. Scores and softmax are float32.
    """
    batch, length, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    laid_out = probe.meets(f"{tower}.attn_scores", f"{tower}.attn_probs")
    if kernel and causal and not past and not laid_out:
        out = causal_attention(q, k, v, jnp.diagonal(mask, axis1=1, axis2=2), scale, softcap)
        return probe(f"{tower}.head_out", out).reshape(batch, length, heads * dim)
    q = q.reshape(batch, length, k.shape[2], -1, dim).transpose(0, 2, 3, 1, 4)  # (B, G, H / G, S, d)
    segments = [(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), m) for k, v, m in (*past, (k, v, mask))]

    def scores_of(q, keys):
        scores = jnp.einsum("bgnd,bgtd->bgnt", q, keys, preferred_element_type=jnp.float32) * scale
        return scores if softcap is None else softcap * jnp.tanh(scores / softcap)

    if laid_out:
        out = _attend_openly(q, segments, scores_of, probe, tower)
    else:
        step, parts = _QUERY_BLOCK if causal else length, []
        for at in range(0, length, step):
            block, end = slice(at, at + step), min(at + step, length)
            own_k, own_v, own_mask = segments[-1]
            own_mask = None if own_mask is None else own_mask[:, block, :end]
            seen = [(k, v, m[:, block]) for k, v, m in segments[:-1]] + [
                (own_k[:, :, :end], own_v[:, :, :end], own_mask)
            ]
            parts.append(_attend_closed(q[..., block, :], seen, scores_of))
        out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, 3)
    out = probe(f"{tower}.head_out", out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim))
    return out.reshape(batch, length, heads * dim)


def _fold(x: jax.Array, batch: int) -> jax.Array:
    """``(B, G, H / G, S, n) -> (batch, G, B / batch * H / G * S, n)``: one matmul per key-value head, with a row for
    every variant, head and token, is several times faster than einsum's own choice."""
    rows, groups, heads, length, last = x.shape
    x = x.reshape(batch, rows // batch, groups, heads, length, last).swapaxes(1, 2)
    return x.reshape(batch, groups, -1, last)


def _unfold(x: jax.Array, rows: int, length: int) -> jax.Array:
    """The inverse of :func:`_fold`."""
    batch, groups, _, last = x.shape
    x = x.reshape(batch, groups, rows // batch, -1, length, last).swapaxes(1, 2)
    return x.reshape(rows, groups, -1, length, last)


def _attend_closed(q: jax.Array, segments, scores_of) -> jax.Array:
    """Attention whose probabilities nobody sees: the segments meet only after their values are read."""
    rows, length = len(q), q.shape[3]
    scores = []
    for keys, _, mask in segments:
        part = scores_of(_fold(q, len(keys)), keys)
        if mask is not None:
            apart = part.reshape(*part.shape[:2], -1, length, part.shape[-1])
            part = jnp.where(mask[:, None, None], apart, jnp.finfo(jnp.float32).min).reshape(part.shape)
        scores.append(part)
    tops = [_unfold(part.max(-1, keepdims=True), rows, length) for part in scores]
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, tops))
    out = total = 0
    for part, (_, values, _) in zip(scores, segments, strict=True):
        part = jnp.exp(part - _fold(top, len(part)))
        total = total + _unfold(part.sum(-1, keepdims=True), rows, length)
        out = out + _unfold(jnp.einsum("bgnt,bgtd->bgnd", part.astype(values.dtype), values), rows, length)
    return (out / total).astype(out.dtype)


def _attend_openly(q: jax.Array, segments, scores_of, probe, tower: str) -> jax.Array:
    """Attention with its scores and probabilities laid out as sites. A query that sees no key reads nothing."""
    rows, groups, heads, length, _ = q.shape
    lowest = jnp.finfo(jnp.float32).min
    scores = [_unfold(scores_of(_fold(q, len(keys)), keys), rows, length) for keys, _, _ in segments]
    scores = jnp.concatenate(scores, -1).reshape(rows, groups * heads, length, -1)
    scores = probe(f"{tower}.attn_scores", scores)
    masks = [mask for _, _, mask in segments if mask is not None]
    if masks:
        mask = jnp.concatenate([jnp.repeat(mask, rows // len(mask), 0) for mask in masks], -1)
        scores = jnp.where(mask[:, None], scores, lowest)
    probs = jnp.where(scores > lowest, jax.nn.softmax(scores, -1), 0)
    values = tuple(values for _, values, _ in segments)
    reader = Reader(values[:-1], values[-1])
    probs = probe(f"{tower}.attn_probs", probs, read=reader)
    out = reader(probs)
    return out.reshape(rows, length, groups, heads, -1).transpose(0, 2, 3, 1, 4)


@flax.struct.dataclass
class Reader:
    """What heads read with their probabilities: ``(B, H, S, keys) -> (B, S, H, d)``, from the values of the past
    segments ``(b, G, P, d)`` and of the tokens themselves ``(B, G, S, d)``."""

    past: tuple[jax.Array, ...]
    own: jax.Array

    def __call__(self, probs: jax.Array) -> jax.Array:
        rows, heads, length, _ = probs.shape
        probs = probs.reshape(rows, self.own.shape[1], -1, length, probs.shape[-1])
        out, at = 0, 0
        for values in (*self.past, self.own):
            part = _fold(probs[..., at : at + values.shape[2]].astype(values.dtype), len(values))
            out = out + _unfold(jnp.einsum("bgnt,bgtd->bgnd", part, values), rows, length)
            at += values.shape[2]
        return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, -1)
