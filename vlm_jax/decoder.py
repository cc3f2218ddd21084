"""The one decoder: a scan over stacked layers, with every intermediate a named site."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.config import TextConfig
from vlm_jax.layers import Embedding, Linear, RMSNorm, attend, rotate
from vlm_jax.rope import mrope
from vlm_jax.sites import LAYER_SITES, Context, Probe


class Window(NamedTuple):
    """The tokens one pass works on: all of a sequence, or a part of it that follows ``past`` tokens.

    rope: cos and sin ``(B, S, head_dim)``; mask ``(B, S, S)``, past_mask ``(B, S, P)`` or None: who sees whom;
    start, decoding: as in :class:`vlm_jax.sites.Context`.
    """

    rope: tuple[jax.Array, jax.Array]
    mask: jax.Array
    past_mask: jax.Array | None = None
    start: int = 0
    decoding: bool = False


class SelfAttention(nnx.Module):
    def __init__(self, key, config: TextConfig):
        q, k, v, o = jax.random.split(key, 4)
        self.head_dim = config.head_dim
        self.q_proj = Linear(q, config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(k, config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(v, config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(o, config.num_attention_heads * config.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def __call__(self, x, window: Window, past, probe: Probe):
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(probe.linear("text.self_attn.q_proj", self.q_proj, x).reshape(heads))
        k = self.k_norm(probe.linear("text.self_attn.k_proj", self.k_proj, x).reshape(heads))
        v = probe.linear("text.self_attn.v_proj", self.v_proj, x).reshape(heads)
        k = rotate(k, *window.rope)
        if past is not None:
            past = (*past, window.past_mask)
        out = attend(rotate(q, *window.rope), k, v, window.mask, probe, "text", past)
        return probe.linear("text.self_attn.o_proj", self.o_proj, out), (k, v)


class MLP(nnx.Module):
    def __init__(self, key, config: TextConfig):
        gate, up, down = jax.random.split(key, 3)
        self.gate_proj = Linear(gate, config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(up, config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(down, config.intermediate_size, config.hidden_size)

    def __call__(self, x, probe: Probe):
        gate = jax.nn.silu(probe.linear("text.mlp.gate_proj", self.gate_proj, x))
        hidden = gate * probe.linear("text.mlp.up_proj", self.up_proj, x)
        return probe.linear("text.mlp.down_proj", self.down_proj, hidden)


class Layer(nnx.Module):
    """One decoder layer. DeepStack's addition belongs to it: it comes before the layer's ``resid_post``."""

    def __init__(self, key, config: TextConfig):
        attn, mlp = jax.random.split(key)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(attn, config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(mlp, config)

    def __call__(self, x, window: Window, past, deepstack, probe: Probe):
        """``x (B, S, D)`` -> the layer's output and its keys and values ``(B, S, G, head_dim)``."""
        x = probe("text.resid_pre", x)
        attn, kv = self.self_attn(self.input_layernorm(x), window, past, probe)
        x = probe("text.resid_mid", x + probe("text.attn_out", attn))
        x = x + probe("text.mlp_out", self.mlp(self.post_attention_layernorm(x), probe))
        if deepstack is not None:
            x = x + probe("text.deepstack", deepstack)
        return probe("text.resid_post", x), kv


class Decoder(nnx.Module):
    def __init__(self, key, config: TextConfig):
        embed, layers, head = jax.random.split(key, 3)
        self.config = config
        self.embed_tokens = Embedding(embed, config.vocab_size, config.hidden_size)
        self.layers = jax.vmap(lambda k: Layer(k, config))(jax.random.split(layers, config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # A tied head reads the embedding: a second reference would be a second, separately trained leaf.
        self.lm_head = None if config.tie_word_embeddings else Linear(head, config.hidden_size, config.vocab_size)

    def rope(self, position_ids: jax.Array):
        """cos, sin ``(B, S, head_dim)`` at ``position_ids (3, B, S)``."""
        return mrope(position_ids, self.config.rope_theta, self.config.head_dim, self.config.mrope_section)

    def window(self, attention_mask: jax.Array, position_ids: jax.Array, start: int = 0) -> Window:
        """The causal window of the tokens from ``start`` on; earlier tokens are its past."""
        length = attention_mask.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        visible = (causal & attention_mask[:, None, :])[:, start:]
        rope = self.rope(position_ids[:, :, start:])
        return Window(rope, visible[:, :, start:], visible[:, :, :start] if start else None, start)

    def scan(
        self,
        x,
        window: Window,
        *,
        layers=(0, None),
        past=None,
        deepstack=None,
        interventions=(),
        taps=frozenset(),
        remat=False,
    ):
        """Runs layers ``layers[0]`` to ``layers[1]`` on ``x (B, S, D)``.

        Args:
            past: keys and values of earlier tokens for the same layers, ``(layers, B, P, G, head_dim)`` twice.
            deepstack: visual features ``(K, B, S, D)`` to add after the first K layers of the model, or None.
            remat: recompute each layer in the backward pass instead of keeping its activations.

        Returns:
            The output ``(B, S, D)``, keys and values ``(layers, B, S, G, head_dim)``, and taps ``(layers, B, S, ...)``.
        """
        first, last, _ = slice(*layers).indices(self.config.num_hidden_layers)
        stack = jax.tree.map(lambda a: a[first:last], self.layers)

        def body(x, scanned):
            layer, index, past = scanned
            probe = Probe(interventions, taps & LAYER_SITES, Context(index, None, window.start, window.decoding))
            x, kv = layer(x, window, past, self.deepstack_at(deepstack, index), probe)
            return x, (kv, probe.taps)

        if remat:
            body = jax.checkpoint(body)
        x, (kv, tapped) = jax.lax.scan(body, x, (stack, jnp.arange(first, last), past))
        return x, kv, tapped

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
        if self.lm_head is not None:
            return self.lm_head(x)
        return x @ self.embed_tokens.weight[...].T
