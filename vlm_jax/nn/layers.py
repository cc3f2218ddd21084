"""The building blocks that towers and decoder share: linear, norms, embedding, activations, rotary, attention."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from vlm_jax.nn.kernels import causal_attention
from vlm_jax.nn.products import product
from vlm_jax.sites import Probe
from vlm_jax.typing import Array, ArrayLike


def _normal(key: PRNGKeyArray, shape: tuple[int, ...], scale: float = 0.02) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(key, shape))


class Linear(nnx.Module):
    """``x @ kernel + bias``; the kernel is ``(in, out)``, the transpose of the Hugging Face weight."""

    def __init__(self, key: PRNGKeyArray, inputs: int, outputs: int, bias: bool = False):
        self.kernel = _normal(key, (inputs, outputs))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: Float[ArrayLike, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        # On CPU the gradient of a flat matmul is several times faster than that of a batched one.
        flat = jnp.asarray(x).reshape(-1, x.shape[-1])
        y = product("ri,io->ro", flat, self.kernel[...]).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """A vector of ``features`` numbers for each of ``rows`` indexes."""

    def __init__(self, key: PRNGKeyArray, rows: int, features: int):
        self.weight = _normal(key, (rows, features))

    def __call__(self, index: Int[ArrayLike, "*rows"]) -> Float[Array, "*rows features"]:
        return self.weight[...][index]


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32; it scales by ``1 + weight`` where ``unit_offset`` (Gemma)."""

    def __init__(self, features: int, eps: float, unit_offset: bool = False):
        self.weight = nnx.Param(jnp.zeros(features) if unit_offset else jnp.ones(features))
        self.eps, self.unit_offset = eps, unit_offset

    def __call__(self, x: Float[ArrayLike, "*rows features"]) -> Float[Array, "*rows features"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        if self.unit_offset:  # Gemma multiplies before it rounds to the activations' precision, Llama afterwards
            return ((1 + self.weight[...].astype(jnp.float32)) * y).astype(x.dtype)
        return self.weight[...] * y.astype(x.dtype)

    @property
    def gain(self) -> Float[Array, "features"]:
        """What the norm multiplies each feature by, once the vector has a root mean square of 1, in float32."""
        weight = self.weight[...].astype(jnp.float32)
        return 1 + weight if self.unit_offset else weight

    def factor(self, x: Float[ArrayLike, "*rows features"]) -> Float[Array, "*rows features"]:
        """What the norm multiplies ``x`` by, in float32: its output is ``x * factor(x)``. With the factor of a sum, the
        norm can be applied to the parts of the sum one by one, and the outputs add up to that of the sum."""
        y = jnp.asarray(x, jnp.float32)
        return self.gain * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)


class LayerNorm(nnx.Module):
    """Layer norm with scale and shift, computed in float32."""

    def __init__(self, features: int, eps: float = 1e-6):
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.eps = eps

    def __call__(self, x: Float[ArrayLike, "*rows features"]) -> Float[Array, "*rows features"]:
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


def rotate(
    x: Float[ArrayLike, "batch tokens heads head_dim"],
    cos: Float[ArrayLike, "batch tokens head_dim"],
    sin: Float[ArrayLike, "batch tokens head_dim"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rotary embedding, computed in float32. As in Llama, dimension ``i`` is paired with ``i + head_dim / 2``."""
    y = x.astype(jnp.float32)
    left, right = jnp.split(y, 2, -1)
    quarter_turn = jnp.concatenate([-right, left], -1)
    return (y * cos[:, :, None] + quarter_turn * sin[:, :, None]).astype(x.dtype)


#: Attention with a causal mask runs over blocks of this many queries. A block skips the keys after its last query.
#: Other attention, as in vision towers or under a knock-out, runs over such blocks from ``_LONG`` queries on, to need
#: less memory.
_QUERY_BLOCK, _LONG = 256, 1024

#: Keys, values and mask of earlier tokens that attention also reads. A segment has fewer rows than the queries where
#: several rows share one past. (An underscore before an axis' name: its size differs from one segment to the next.)
Segment = tuple[
    Float[ArrayLike, "_rows _past groups head_dim"],
    Float[ArrayLike, "_rows _past groups head_dim"],
    Bool[ArrayLike, "_rows tokens _past"],
]


def attend(
    q: Float[ArrayLike, "batch tokens heads head_dim"],
    k: Float[ArrayLike, "batch keys groups head_dim"],
    v: Float[ArrayLike, "batch keys groups head_dim"],
    mask: Bool[ArrayLike, "batch tokens keys"] | None,
    probe: Probe,
    tower: str,
    past: Sequence[Segment] = (),
    *,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    kernel: bool = False,
) -> Float[Array, "batch tokens heads*head_dim"]:
    """Grouped-query attention. Scores and softmax are float32.

    Args:
        q, k, v: queries, keys and values. Each of the ``groups`` key-value heads serves ``heads / groups`` query heads.
        mask: True where a query (axis 1) may see a key (axis 2); None where all see all.
        probe: meets the sites ``attn_scores`` and ``attn_probs (batch, heads, tokens, keys)``, whose keys are those of
            the past segments and then those of ``k``, and ``head_out (batch, tokens, heads, head_dim)``.
        tower: of the sites, "text" or "visual".
        past: segments of earlier tokens. The rows of a segment divide the batch: row ``i`` of the batch reads row
            ``i // (batch / rows)`` of it. So many variants of the later tokens share one copy of their past.
        scale: factor of the scores; ``head_dim ** -0.5`` where None.
        softcap: squashes the scores into (-softcap, softcap).
        causal: promises that ``mask`` lets no query see a later key.
        kernel: promises that ``mask`` is the one of :func:`vlm_jax.nn.kernels.causal_attention`. That kernel then
            computes the attention, unless there is a past or a probe meets the scores or the probabilities.
    """
    batch, length, heads, dim = q.shape
    factor = dim**-0.5 if scale is None else scale
    observed = probe.meets(f"{tower}.attn_scores", f"{tower}.attn_probs")
    if kernel and causal and mask is not None and not past and not observed:
        out = causal_attention(q, k, v, jnp.diagonal(mask, axis1=1, axis2=2), factor, softcap)
        return probe(f"{tower}.head_out", out).reshape(batch, length, heads * dim)
    q = q.reshape(batch, length, k.shape[2], -1, dim).transpose(0, 2, 3, 1, 4)  # (B, G, H / G, S, d)
    segments: list[tuple] = [(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), m) for k, v, m in (*past, (k, v, mask))]

    def scores_of(q, keys):
        scores = product("bgnd,bgtd->bgnt", q, keys, jnp.float32) * factor
        return scores if softcap is None else softcap * jnp.tanh(scores / softcap)

    if observed:

        def attend_with_probs(q, masks, probe):
            masked = [(keys, values, mask) for (keys, values, _), mask in zip(segments, masks, strict=True)]
            return _attend_with_probs(q, masked, scores_of, probe, tower)

        masks = tuple(mask for _, _, mask in segments)
        if length >= _LONG and probe.splits_queries(f"{tower}.attn_scores", f"{tower}.attn_probs"):

            def attend_block(q, masks, first):
                block = probe.behind(first)
                return attend_with_probs(q, masks, block), block.taps

            out, taps = _in_turn(attend_block, q, masks)
            probe.taps |= taps
        else:
            out = attend_with_probs(q, masks, probe)
    elif not causal and not past and length >= _LONG:
        keys, values, _ = segments[0]
        out, _ = _in_turn(lambda q, mask, _: (_attend_fused(q, [(keys, values, mask)], scores_of), {}), q, mask)
    else:
        step, parts = _QUERY_BLOCK if causal else length, []
        for start in range(0, length, step):
            block, end = slice(start, start + step), min(start + step, length) if causal else k.shape[1]
            keys, values, _ = segments[-1]
            visible = None if mask is None else mask[:, block, :end]
            visible_segments: list[tuple] = [(*segment[:2], segment[2][:, block]) for segment in segments[:-1]]
            visible_segments.append((keys[:, :, :end], values[:, :, :end], visible))
            parts.append(_attend_fused(q[..., block, :], visible_segments, scores_of))
        out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, 3)
    out = probe(f"{tower}.head_out", out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim))
    return out.reshape(batch, length, heads * dim)


def _fold(x: jax.Array, batch: int) -> jax.Array:
    """``(B, G, H / G, S, n) -> (batch, G, B / batch * H / G * S, n)``.

    This gives one matmul per key-value head, with a row for every variant, head and token. It is several times faster
    than the matmul that einsum chooses by itself.
    """
    rows, groups, heads, length, last = x.shape
    x = x.reshape(batch, rows // batch, groups, heads, length, last).swapaxes(1, 2)
    return x.reshape(batch, groups, -1, last)


def _unfold(x: jax.Array, rows: int, length: int) -> jax.Array:
    """The inverse of :func:`_fold`."""
    batch, groups, _, last = x.shape
    x = x.reshape(batch, groups, rows // batch, -1, length, last).swapaxes(1, 2)
    return x.reshape(rows, groups, -1, length, last)


def _attend_fused(q: jax.Array, segments: Sequence[tuple], scores_of: Callable) -> jax.Array:
    """Attention that never joins the probabilities of the segments: each segment is read, then the results are added.

    Args:
        q: ``(B, G, H / G, S, d)``. segments: keys and values ``(b, G, keys, d)``, mask ``(b, S, keys)`` or None.

    Returns:
        ``(B, G, H / G, S, d)``.
    """
    rows, length = len(q), q.shape[3]
    scores = []
    for keys, _, mask in segments:
        segment_scores = scores_of(_fold(q, len(keys)), keys)
        if mask is not None:
            shape = segment_scores.shape
            per_query = segment_scores.reshape(*shape[:2], -1, length, shape[-1])
            segment_scores = jnp.where(mask[:, None, None], per_query, jnp.finfo(jnp.float32).min).reshape(shape)
        scores.append(segment_scores)
    maxima = [_unfold(segment_scores.max(-1, keepdims=True), rows, length) for segment_scores in scores]
    maximum = jax.lax.stop_gradient(functools.reduce(jnp.maximum, maxima))
    out: Any = 0
    total: Any = 0
    for segment_scores, (_, values, _) in zip(scores, segments, strict=True):
        weights = jnp.exp(segment_scores - _fold(maximum, len(segment_scores)))
        total = total + _unfold(weights.sum(-1, keepdims=True), rows, length)
        read = product("bgnt,bgtd->bgnd", weights.astype(values.dtype), values, jnp.float32)
        out = out + _unfold(read, rows, length)
    return (out / total).astype(q.dtype)


def _in_turn(attend_block: Callable, q: jax.Array, masks: Any) -> tuple[jax.Array, dict[str, Any]]:
    """Attention of one block of queries after the other, so that the scores of one block are in memory at a time. A
    backward pass computes them again.

    Args:
        attend_block: ``(queries, their masks, the number of the first query) -> (outputs, taps)``.
        q: ``(B, G, H / G, S, d)``. masks: a pytree of arrays ``(B, S, keys)``.

    Returns:
        The outputs, and the sums of the blocks' taps.
    """
    length = q.shape[3]
    whole = length // _QUERY_BLOCK * _QUERY_BLOCK
    one = jax.checkpoint(attend_block)

    def blocks(x: jax.Array, axis: int) -> jax.Array:
        x = jax.lax.slice_in_dim(x, 0, whole, axis=axis)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, _QUERY_BLOCK, *x.shape[axis + 1 :]), axis, 0)

    scanned = blocks(q, 3), jax.tree.map(lambda mask: blocks(mask, 1), masks), jnp.arange(0, whole, _QUERY_BLOCK)
    out, taps = jax.lax.map(lambda block: one(*block), scanned)
    out = jnp.moveaxis(out, 0, 3).reshape(*q.shape[:3], whole, q.shape[4])
    taps = jax.tree.map(lambda tap: tap.sum(0), taps)
    if whole == length:
        return out, taps
    rest, rest_taps = one(q[..., whole:, :], jax.tree.map(lambda mask: mask[:, whole:], masks), whole)
    return jnp.concatenate([out, rest], 3), jax.tree.map(jnp.add, taps, rest_taps)


def _attend_with_probs(
    q: jax.Array, segments: Sequence[tuple], scores_of: Callable, probe: Probe, tower: str
) -> jax.Array:
    """Attention whose scores and probabilities are sites; otherwise as :func:`_attend_fused`.

    A query that sees no key reads zeros.
    """
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
    """What the heads read with given probabilities.

    past: values of the past segments ``(b, G, P, d)``, where ``b`` divides the batch.
    own: values of the tokens themselves ``(B, G, S, d)``.
    """

    past: tuple[Float[Array, "_rows groups _past head_dim"], ...]
    own: Float[Array, "batch groups tokens head_dim"]

    def __call__(self, probs: Float[Array, "batch heads tokens keys"]) -> Float[Array, "batch tokens heads head_dim"]:
        """``keys``: those of the past segments, then those of the tokens themselves."""
        rows, heads, length, _ = probs.shape
        probs = probs.reshape(rows, self.own.shape[1], -1, length, probs.shape[-1])
        out: Any = 0
        start = 0
        for values in (*self.past, self.own):
            segment_probs = probs[..., start : start + values.shape[2]].astype(values.dtype)
            folded = _fold(segment_probs, len(values))
            out = out + _unfold(product("bgnt,bgtd->bgnd", folded, values, jnp.float32), rows, length)
            start += values.shape[2]
        return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, -1).astype(self.own.dtype)
