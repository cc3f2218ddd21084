"""The two circuits of an attention head, as matrices (Elhage et al. 2021).

QK says which tokens a head attends to, OV what it writes if it attends to a token. Both read the residual stream
through the layer's first norm. Its scale depends on the token and is left out; its gain can be folded in.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from vlm_jax import Model
from vlm_jax.errors import UserError
from vlm_jax.nn.stacks import layer_at
from vlm_jax.typing import Array


def ov(model: Model, layer: int, head: int, *, fold: bool = True) -> Float[Array, "width width"]:
    """What a head writes to the residual stream if it attends to one token: ``x @ ov`` for that token's ``x``.

    It is ``W_V W_O``, with the value head that the head shares with others of its group. Biases are left out.

    Args:
        fold: ``x`` is the residual stream divided by its root mean square: the gain of the layer's first norm is part
            of the matrix. Without it, ``x`` is the output of that norm. The norm that Gemma has behind its attention
            comes after the sum over heads; with ``fold``, its gain is part of the matrix too, and its scale is not.

    Raises:
        UserError: if the model has no such layer or head.
    """
    own, group, (first, last), size = _head(model, layer, head)
    values = _columns(own.self_attn.v_proj, group, size)
    out = own.self_attn.o_proj.kernel[...][head * size : (head + 1) * size].astype(jnp.float32)
    return _folded(values, first, fold) @ (out * last if fold and last is not None else out)


def qk(model: Model, layer: int, head: int, *, fold: bool = True) -> Float[Array, "width width"]:
    """How much a head's query at one token fits its key at another: ``x @ qk @ y`` for the streams ``x`` of the token
    that attends and ``y`` of the one that is attended to.

    It is ``W_Q W_K^T`` (in the layout of these kernels), with the key head that the head shares with others of its
    group. It lacks the rotary embedding, so it is exact only for tokens at the same position; the norms of queries and
    keys of models that have them (Qwen3, Gemma 3); biases; and the factor of the scores, ``head_dim ** -0.5``.

    Args:
        fold: as in :func:`ov`, for ``x`` and ``y``.

    Raises:
        UserError: if the model has no such layer or head.
    """
    own, group, (first, _), size = _head(model, layer, head)
    queries, keys = _columns(own.self_attn.q_proj, head, size), _columns(own.self_attn.k_proj, group, size)
    return _folded(queries, first, fold) @ _folded(keys, first, fold).T


def _head(model: Model, layer: int, head: int) -> tuple[Any, int, tuple[Any, Any], int]:
    """A layer, the key-value head of one of its heads, the gains of the norms before and behind the attention (None
    without one), and the width of a head."""
    config = model.config.text
    limits = {"layer": (layer, config.num_hidden_layers), "head": (head, config.num_attention_heads)}
    for name, (number, count) in limits.items():
        if not 0 <= number < count:
            raise UserError(f"there is no {name} {number}: the model has {count}, so name one from 0 to {count - 1}")
    own = layer_at(model.text.layers, jnp.asarray(layer))
    gains = own.input_layernorm.gain, own.post_attention_layernorm.gain if config.sandwich_norm else None
    return own, head * config.num_key_value_heads // config.num_attention_heads, gains, config.head_dim


def _columns(linear: Any, number: int, size: int) -> Float[Array, "width head_dim"]:
    return linear.kernel[...][:, number * size : (number + 1) * size].astype(jnp.float32)


def _folded(kernel: Any, gain: Any, fold: bool) -> Float[Array, "width head_dim"]:
    return gain[:, None] * kernel if fold else kernel
