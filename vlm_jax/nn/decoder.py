"""The one decoder: a scan over stacked layers, with every intermediate a named site."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlm_jax.config import TextConfig
from vlm_jax.mesh.sharding import constrain
from vlm_jax.nn.layers import ACTIVATIONS, Embedding, Linear, RMSNorm, attend, rotate
from vlm_jax.nn.rope import rotary
from vlm_jax.sites import LAYER_SITES, NO_TAPS, Context, Probe, scan_layers

#: The logical axes of the residual stream ``(B, S, D)`` and of heads ``(B, S, H, head_dim)``.
_RESIDUAL, _HEADS = ("batch", None, None), ("batch", None, "heads", None)


class Window(NamedTuple):
    """The tokens one pass works on: all of a sequence, or a part of it that follows ``past`` tokens.

    rope: cos and sin ``(R, B, S, head_dim)``; mask ``(R, B, S, S)``, past_mask ``(R, B, S, P)`` of each segment of the
    past: who sees whom; ``R`` kinds of layers (full, sliding). causal: no token sees a later one of the window.
    start, decoding: as in :class:`vlm_jax.sites.Context`.
    """

    rope: tuple[jax.Array, jax.Array]
    mask: jax.Array
    past_mask: tuple[jax.Array, ...] = ()
    causal: bool = False
    start: Any = 0
    decoding: bool = False


class SelfAttention(nnx.Module):
    def __init__(self, key, config: TextConfig):
        q, k, v, o = jax.random.split(key, 4)
        self.config = config
        heads, groups = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(q, config.hidden_size, heads, "q_proj" in bias)
        self.k_proj = Linear(k, config.hidden_size, groups, "k_proj" in bias)
        self.v_proj = Linear(v, config.hidden_size, groups, "v_proj" in bias)
        self.o_proj = Linear(o, heads, config.hidden_size, "o_proj" in bias)
        norm = functools.partial(RMSNorm, config.head_dim, config.rms_norm_eps, config.unit_offset_norm)
        self.q_norm, self.k_norm = (norm(), norm()) if config.qk_norm else (None, None)

    def __call__(self, x, window: Window, past, probe: Probe):
        config = self.config
        heads = (*x.shape[:2], -1, config.head_dim)
        q, k, v = (
            constrain(probe.linear(f"text.self_attn.{name}", getattr(self, name), x).reshape(heads), *_HEADS)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *window.rope), rotate(k, *window.rope)
        past = [(*kv, mask) for kv, mask in zip(past, window.past_mask, strict=True)]
        scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        softcap = config.attn_logit_softcapping
        how = {"scale": scale, "softcap": softcap, "causal": window.causal, "kernel": config.attention == "splash"}
        out = attend(q, k, v, window.mask, probe, "text", past, **how)
        return probe.linear("text.self_attn.o_proj", self.o_proj, out), (k, v)


class MLP(nnx.Module):
    def __init__(self, key, config: TextConfig):
        gate, up, down = jax.random.split(key, 3)
        self.hidden_act = config.hidden_act
        self.gate_proj = Linear(gate, config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = Linear(up, config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(down, config.intermediate_size, config.hidden_size, config.mlp_bias)

    def __call__(self, x, probe: Probe):
        gate = ACTIVATIONS[self.hidden_act](probe.linear("text.mlp.gate_proj", self.gate_proj, x))
        hidden = constrain(gate * probe.linear("text.mlp.up_proj", self.up_proj, x), "batch", None, "mlp")
        return probe.linear("text.mlp.down_proj", self.down_proj, hidden)


class Layer(nnx.Module):
    """One decoder layer.

    The sites ``attn_out`` and ``mlp_out`` are what the modules add to the residual stream: after Gemma's sandwich
    norms. DeepStack's addition belongs to the layer: it comes before ``resid_post``.
    """

    def __init__(self, key, config: TextConfig):
        attn, mlp = jax.random.split(key)
        norm = functools.partial(RMSNorm, config.hidden_size, config.rms_norm_eps, config.unit_offset_norm)
        self.sandwich_norm = config.sandwich_norm
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(attn, config)
        # Gemma gives the name of Llama's norm before the MLP to its norm after the attention.
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm() if config.sandwich_norm else None
        self.post_feedforward_layernorm = norm() if config.sandwich_norm else None
        self.mlp = MLP(mlp, config)

    def __call__(self, x, window: Window, past, deepstack, probe: Probe):
        """``x (B, S, D)`` -> the layer's output and its keys and values ``(B, S, G, head_dim)``."""
        x = probe("text.resid_pre", constrain(x, *_RESIDUAL))
        attn, kv = self.self_attn(self.input_layernorm(x), window, past, probe)
        if self.sandwich_norm:
            attn = self.post_attention_layernorm(attn)
        x = probe("text.resid_mid", x + probe("text.attn_out", constrain(attn, *_RESIDUAL)))
        if self.sandwich_norm:
            out = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x), probe))
        else:
            out = self.mlp(self.post_attention_layernorm(x), probe)
        x = x + probe("text.mlp_out", constrain(out, *_RESIDUAL))
        if deepstack is not None:
            x = x + probe("text.deepstack", deepstack)
        return probe("text.resid_post", x), kv


class Decoder(nnx.Module):
    def __init__(self, key, config: TextConfig):
        embed, layers, head = jax.random.split(key, 3)
        self.config = config
        self.embed_tokens = Embedding(embed, config.vocab_size, config.hidden_size)
        self.layers = jax.vmap(lambda k: Layer(k, config))(jax.random.split(layers, config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.unit_offset_norm)
        # A tied head reads the embedding: a second reference would be a second, separately trained leaf.
        self.lm_head = None if config.tie_word_embeddings else Linear(head, config.hidden_size, config.vocab_size)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Token embeddings ``(..., D)``."""
        x = self.embed_tokens(input_ids)
        return x if self.config.embed_scale == 1 else x * jnp.asarray(self.config.embed_scale, x.dtype)

    def rope(self, position_ids: jax.Array):
        """cos, sin ``(R, B, S, head_dim)`` at ``position_ids (3, B, S)``, for each kind of layer."""
        cos, sin = zip(*(rotary(position_ids, rope, self.config.head_dim) for _, rope in self.config.rope), strict=True)
        return jnp.stack(cos), jnp.stack(sin)

    def visible(self, visible: jax.Array, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """``visible (B, S, K)`` as each kind of layer has it, ``(R, B, S, K)``: sliding layers look no further back
        than their window. ``queries (B, S)``, ``keys (B, K)``: positions in the text."""
        masks = []
        for kind, _ in self.config.rope:
            sliding = kind == "sliding_attention"
            back = queries[:, :, None] - keys[:, None, :]
            masks.append(visible & (back < self.config.sliding_window) if sliding else visible)
        return jnp.stack(masks)

    def window(
        self, attention_mask: jax.Array, position_ids: jax.Array, start: int = 0, is_image: jax.Array | None = None
    ) -> Window:
        """The causal window of the tokens from ``start`` on; earlier tokens are its past, in one segment.

        Where ``config.bidirectional_images``, tokens of one run of ``is_image (B, T)`` see each other too.
        """
        length = attention_mask.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))[None]
        bidirectional = self.config.bidirectional_images and is_image is not None
        if bidirectional:
            first = is_image & ~jnp.pad(is_image, [(0, 0), (1, 0)])[:, :-1]
            block = jnp.where(is_image, jnp.cumsum(first, 1), 0)
            causal = causal | ((block[:, :, None] == block[:, None, :]) & is_image[:, :, None])
        positions = position_ids[0]
        mask = self.visible((causal & attention_mask[:, None, :])[:, start:], positions[:, start:], positions)
        rope = self.rope(position_ids[:, :, start:])
        past_mask = (mask[..., :start],) if start else ()
        return Window(rope, mask[..., start:], past_mask, not bidirectional, start)

    def at(self, window: Window, index) -> Window:
        """The window as layer ``index`` sees it: without the axis of kinds."""
        kinds = [kind for kind, _ in self.config.rope]
        kind = np.array([kinds.index(kind) for kind in self.config.layer_types])
        kind = 0 if len(kinds) == 1 else jnp.asarray(kind)[index]
        cos, sin = window.rope
        past_mask = tuple(mask[kind] for mask in window.past_mask)
        return window._replace(rope=(cos[kind], sin[kind]), mask=window.mask[kind], past_mask=past_mask)

    def scan(
        self,
        x,
        window: Window,
        *,
        layers=(0, None),
        past=(),
        deepstack=None,
        interventions=(),
        layered=(),
        taps=NO_TAPS,
        remat: bool | tuple[str, ...] = False,
    ):
        """Runs layers ``layers[0]`` to ``layers[1]`` on ``x (B, S, D)``.

        Args:
            past: segments of earlier tokens: their keys and values for the same layers, ``(layers, B, P, G,
                head_dim)`` twice. Segments stay apart, so that many variants of the later tokens share one copy.
            deepstack: visual features ``(K, B, S, D)`` to add after the first K layers of the model, or None.
            layered: interventions whose arrays all have a leading axis of the model's layers; each layer gets its own
                slice. So the gradient of such an array is written layer by layer, while that of an array which every
                layer indexes is summed up in full size in each of them.
            taps: site -> :class:`vlm_jax.sites.Tap`.
            remat: recompute each layer in the backward pass instead of keeping its activations; or all of it but the
                values at these sites.

        Returns:
            The output ``(B, S, D)``, keys and values ``(layers, B, S, G, head_dim)``, and taps ``(layers, B, S, ...)``.
        """
        first, last, _ = slice(*layers).indices(self.config.num_hidden_layers)
        whole = (first, last) == (0, self.config.num_hidden_layers)
        # A part of the stack would be a copy of it; where layers are run again anyway, each can be looked up.
        stack = self.layers if whole else None if remat else jax.tree.map(lambda a: a[first:last], self.layers)
        layered = jax.tree.map(lambda a: a[first:last], tuple(layered))

        taps = {site: tap for site, tap in taps.items() if site in LAYER_SITES}

        def body(x, scanned, index):
            layer, past, own = scanned
            layer = jax.tree.map(lambda a: a[index], self.layers) if layer is None else layer
            probe = Probe((*interventions, *own), taps, Context(index, start=window.start, decoding=window.decoding))
            x, kv = layer(x, self.at(window, index), past, self.deepstack_at(deepstack, index), probe)
            return x, kv, probe.taps

        if remat:
            keep = () if remat is True else remat
            body = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(*keep))
        return scan_layers(body, x, (stack, tuple(past), layered), jnp.arange(first, last), taps)

    @staticmethod
    def deepstack_at(deepstack, index):
        """What DeepStack adds after layer ``index``: ``(B, S, D)``, zeros above its last layer."""
        if deepstack is None:
            return None
        count = len(deepstack)
        return jnp.where(index < count, jnp.asarray(deepstack)[jnp.minimum(index, count - 1)], 0)

    def head(self, x: jax.Array, probe: Probe) -> jax.Array:
        """``(B, S, D)`` after the last layer -> final norm (a site) -> ``(B, S, V)``."""
        return self.logits(probe("text.norm", self.norm(x)))

    def logits(self, x: jax.Array) -> jax.Array:
        """``(..., D)`` after the final norm -> ``(..., V)``."""
        logits = x @ self.embed_tokens.weight[...].T if self.lm_head is None else self.lm_head(x)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)
