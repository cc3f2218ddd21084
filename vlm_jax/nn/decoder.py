"""The one decoder: a scan over stacked layers, with every intermediate a named site."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from vlm_jax.config import TextConfig
from vlm_jax.mesh.sharding import constrain
from vlm_jax.nn.layers import ACTIVATIONS, Embedding, Linear, RMSNorm, attend, rotate
from vlm_jax.nn.products import product
from vlm_jax.nn.rope import rotary
from vlm_jax.nn.stacks import layer_at, scanned_layer
from vlm_jax.nn.visibility import Tokens, visible
from vlm_jax.sites import LAYER_SITES, NO_TAPS, Context, Probe, Tap, scan_layers
from vlm_jax.typing import Array, ArrayLike

#: Logical axes of the residual stream ``(batch, tokens, width)`` and of heads ``(batch, tokens, heads, head_dim)``.
_RESIDUAL, _HEADS = ("batch", None, None), ("batch", None, "heads", None)

#: Keys and values of one layer, and of a stack of layers.
KeyValues = tuple[
    Float[ArrayLike, "_batch _tokens groups head_dim"], Float[ArrayLike, "_batch _tokens groups head_dim"]
]
StackedKeyValues = tuple[
    Float[ArrayLike, "layers _batch _tokens groups head_dim"],
    Float[ArrayLike, "layers _batch _tokens groups head_dim"],
]


class Window(NamedTuple):
    """The tokens that one pass computes: a whole sequence, or the part of it that follows the tokens of the past.

    rope: cosine and sine of the rotary angles.
    mask: True where a token (axis "tokens") may see a token of the window (axis "keys").
    past_mask: the same for the keys of each segment of the past.
    causal: no token sees a later one of the window.
    start, decoding: as in :class:`vlm_jax.sites.Context`.

    The leading axis ``kinds`` runs over the kinds of layers (full, sliding); :meth:`Decoder.at` picks one and drops it.
    """

    rope: tuple[Float[Array, "*kinds batch tokens head_dim"], Float[Array, "*kinds batch tokens head_dim"]]
    mask: Bool[Array, "*kinds batch tokens keys"]
    past_mask: tuple[Bool[Array, "*kinds batch tokens _past"], ...] = ()
    causal: bool = False
    start: Any = 0
    decoding: bool = False


class SelfAttention(nnx.Module):
    def __init__(self, key: PRNGKeyArray, config: TextConfig):
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

    def __call__(
        self, x: Float[ArrayLike, "batch tokens width"], window: Window, past: Sequence[KeyValues], probe: Probe
    ) -> tuple[Float[Array, "batch tokens width"], KeyValues]:
        """The module's output and its keys and values; ``past`` holds those of earlier tokens, in segments."""
        config = self.config
        heads = (*x.shape[:2], -1, config.head_dim)
        q, k, v = (
            constrain(probe.linear(f"text.self_attn.{name}", getattr(self, name), x).reshape(heads), *_HEADS)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *window.rope), rotate(k, *window.rope)
        segments = [(*key_values, mask) for key_values, mask in zip(past, window.past_mask, strict=True)]
        scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        softcap = config.attn_logit_softcapping
        kernel = config.attention == "splash"
        options = {"scale": scale, "softcap": softcap, "causal": window.causal, "kernel": kernel}
        out = attend(q, k, v, window.mask, probe, "text", segments, **options)
        return probe.linear("text.self_attn.o_proj", self.o_proj, out), (k, v)


class MLP(nnx.Module):
    def __init__(self, key: PRNGKeyArray, config: TextConfig):
        gate, up, down = jax.random.split(key, 3)
        self.hidden_act = config.hidden_act
        self.gate_proj = Linear(gate, config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = Linear(up, config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(down, config.intermediate_size, config.hidden_size, config.mlp_bias)

    def __call__(self, x: Float[ArrayLike, "batch tokens width"], probe: Probe) -> Float[Array, "batch tokens width"]:
        gate = ACTIVATIONS[self.hidden_act](probe.linear("text.mlp.gate_proj", self.gate_proj, x))
        hidden = constrain(gate * probe.linear("text.mlp.up_proj", self.up_proj, x), "batch", None, "mlp")
        return probe.linear("text.mlp.down_proj", self.down_proj, hidden)


class Layer(nnx.Module):
    """One decoder layer.

    The sites ``attn_out`` and ``mlp_out`` are what the modules add to the residual stream, so in Gemma they come after
    the sandwich norms. DeepStack's addition is part of the layer: it comes before ``resid_post``.
    """

    def __init__(self, key: PRNGKeyArray, config: TextConfig):
        attn, mlp = jax.random.split(key)
        norm = functools.partial(RMSNorm, config.hidden_size, config.rms_norm_eps, config.unit_offset_norm)
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(attn, config)
        # Gemma gives the name of Llama's norm before the MLP to its norm after the attention.
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm() if config.sandwich_norm else None
        self.post_feedforward_layernorm = norm() if config.sandwich_norm else None
        self.mlp = MLP(mlp, config)

    def __call__(
        self,
        x: Float[ArrayLike, "batch tokens width"],
        window: Window,
        past: Sequence[KeyValues],
        deepstack: Float[ArrayLike, "batch tokens width"] | None,
        probe: Probe,
    ) -> tuple[Float[Array, "batch tokens width"], KeyValues]:
        """The layer's output, and its keys and values.

        Args:
            window: at this layer (:meth:`Decoder.at`).
            past: keys and values of earlier tokens, in segments.
            deepstack: what DeepStack adds after the MLP.
        """
        x = probe("text.resid_pre", constrain(x, *_RESIDUAL))
        attn, key_values = self.self_attn(self.input_layernorm(x), window, past, probe)
        if self.pre_feedforward_layernorm is not None:
            attn = self.post_attention_layernorm(attn)
        x = probe("text.resid_mid", x + probe("text.attn_out", constrain(attn, *_RESIDUAL)))
        if self.pre_feedforward_layernorm is not None and self.post_feedforward_layernorm is not None:
            out = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x), probe))
        else:
            out = self.mlp(self.post_attention_layernorm(x), probe)
        x = x + probe("text.mlp_out", constrain(out, *_RESIDUAL))
        if deepstack is not None:
            x = x + probe("text.deepstack", deepstack)
        return probe("text.resid_post", x), key_values


class Decoder(nnx.Module):
    """The language model: token embeddings, a stack of layers, a final norm and the unembedding.

    ``layers`` is one :class:`Layer` whose arrays have a leading axis of layers.
    """

    def __init__(self, key: PRNGKeyArray, config: TextConfig):
        embed, layers, head = jax.random.split(key, 3)
        self.config = config
        self.embed_tokens = Embedding(embed, config.vocab_size, config.hidden_size)
        own = config.registers if config.registers is not None and config.registers.trained else None
        self.register_embeddings = None if own is None else Embedding(embed, own.count, config.hidden_size)
        self.layers = jax.vmap(lambda k: Layer(k, config))(jax.random.split(layers, config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.unit_offset_norm)
        # A tied head reads embed_tokens: a reference to it here would be a second leaf, which is trained separately.
        self.lm_head = None if config.tie_word_embeddings else Linear(head, config.hidden_size, config.vocab_size)

    @property
    def dtype(self) -> jnp.dtype:
        """Precision of the activations. The matrices may have fewer bits (``weights`` of :func:`vlm_jax.load`)."""
        return self.norm.weight.dtype

    def embed(
        self, input_ids: Int[ArrayLike, "*batch"], register_index: Int[ArrayLike, "*batch"] | None = None
    ) -> Float[Array, "*batch width"]:
        """Token embeddings, and those of registers that have embeddings of their own.

        Args:
            register_index: the number of each register within its image, -1 for other tokens.
        """
        x = self.embed_tokens(input_ids).astype(self.dtype)
        if self.register_embeddings is not None and register_index is not None:
            own = self.register_embeddings(jnp.maximum(register_index, 0))
            x = jnp.where(jnp.asarray(register_index)[..., None] >= 0, own, x)
        return x if self.config.embed_scale == 1 else x * jnp.asarray(self.config.embed_scale, x.dtype)

    def rope(
        self, position_ids: Int[ArrayLike, "3 batch tokens"]
    ) -> tuple[Float[Array, "kinds batch tokens head_dim"], Float[Array, "kinds batch tokens head_dim"]]:
        """Cosine and sine of the rotary angles, for each kind of layer."""
        cos, sin = zip(*(rotary(position_ids, rope, self.config.head_dim) for _, rope in self.config.rope), strict=True)
        return jnp.stack(cos), jnp.stack(sin)

    def visible(
        self,
        visible: Bool[ArrayLike, "batch tokens keys"],
        queries: Int[ArrayLike, "batch tokens"],
        keys: Int[ArrayLike, "batch keys"],
    ) -> Bool[Array, "kinds batch tokens keys"]:
        """Which keys the queries see in each kind of layer, given which keys they see in full attention.

        In a sliding layer a query sees only the last ``sliding_window`` tokens up to itself.

        Args:
            queries, keys: their positions in the text.
        """
        masks = []
        for kind, _ in self.config.rope:
            if kind == "sliding_attention":
                distance = queries[:, :, None] - keys[:, None, :]
                masks.append(visible & (distance < self.config.sliding_window))
            else:
                masks.append(visible)
        return jnp.stack(masks)

    def window(self, tokens: Tokens, position_ids: Int[ArrayLike, "3 batch length"], start: int = 0) -> Window:
        """The window of the tokens from ``start`` on; the earlier tokens are its past, in one segment."""
        config, positions = self.config, position_ids[0]
        seen = visible(tokens, config.registers, config.bidirectional_images)
        causal = tokens.is_image is None or not (
            config.bidirectional_images or (config.registers is not None and config.registers.mask == "mitre")
        )
        mask = self.visible(seen[:, start:], positions[:, start:], positions)
        rope = self.rope(position_ids[:, :, start:])
        past_mask = (mask[..., :start],) if start else ()
        return Window(rope, mask[..., start:], past_mask, causal, start)

    def at(self, window: Window, index: Int[ArrayLike, ""] | int) -> Window:
        """The window as layer ``index`` sees it, without the axis of kinds."""
        kinds = [kind for kind, _ in self.config.rope]
        kind_of_layer = np.array([kinds.index(kind) for kind in self.config.layer_types])
        kind = 0 if len(kinds) == 1 else jnp.asarray(kind_of_layer)[index]
        cos, sin = window.rope
        past_mask = tuple(mask[kind] for mask in window.past_mask)
        return window._replace(rope=(cos[kind], sin[kind]), mask=window.mask[kind], past_mask=past_mask)

    def scan(
        self,
        x: Float[ArrayLike, "batch tokens width"],
        window: Window,
        *,
        layers: tuple[int, int | None] = (0, None),
        past: Sequence[StackedKeyValues] = (),
        deepstack: Float[ArrayLike, "levels batch tokens width"] | None = None,
        interventions: Sequence[Any] = (),
        layered: Sequence[Any] = (),
        taps: Mapping[str, Tap] = NO_TAPS,
        remat: bool | tuple[str, ...] = False,
    ) -> tuple[Float[Array, "batch tokens width"], StackedKeyValues, dict[str, Any]]:
        """Runs the layers from ``layers[0]`` up to, but not including, ``layers[1]`` (None: to the last).

        Args:
            past: segments of earlier tokens: their keys and values in the layers that run. Segments are not joined, so
                that many variants of the later tokens share one copy.
            deepstack: visual features, one level for each of the model's first layers.
            interventions: :class:`vlm_jax.sites.Intervention`, applied in order at each site.
            layered: interventions whose arrays all have a leading axis of the model's layers. Each layer gets only its
                slice, so the gradient of such an array is written layer by layer. An array in ``interventions`` is
                indexed by every layer, so its gradient is summed in full size in each of them.
            taps: site -> :class:`vlm_jax.sites.Tap`.
            remat: True computes each layer again in the backward pass instead of keeping its activations. Names of
                sites: the same, but the values at these sites are kept.

        Returns:
            The output, the keys and values of the layers that ran, and the taps, with a leading axis of the layers.
        """
        first, last, _ = slice(*layers).indices(self.config.num_hidden_layers)
        if (first, last) == (0, self.config.num_hidden_layers):
            stack = self.layers
        elif remat:
            stack = None  # a slice would be a copy of the weights, so the body looks up its layer, in both passes
        else:
            stack = jax.tree.map(lambda a: a[first:last], self.layers)
        layered = jax.tree.map(lambda a: a[first:last], tuple(layered))
        taps = {site: tap for site, tap in taps.items() if site in LAYER_SITES}

        def body(x, scanned, index):
            layer, past, layer_interventions = scanned
            layer = layer_at(self.layers, index) if layer is None else scanned_layer(layer, self.layers, index)
            context = Context(index, start=window.start, decoding=window.decoding)
            probe = Probe((*interventions, *layer_interventions), taps, context)
            x, key_values = layer(x, self.at(window, index), past, self.deepstack_at(deepstack, index), probe)
            return x, key_values, probe.taps

        if remat:
            keep = () if remat is True else remat
            body = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(*keep))
        return scan_layers(body, x, (stack, tuple(past), layered), jnp.arange(first, last), taps)

    @staticmethod
    def deepstack_at(
        deepstack: Float[ArrayLike, "levels batch tokens width"] | None, index: Int[ArrayLike, ""] | int
    ) -> Float[Array, "batch tokens width"] | None:
        """What DeepStack adds after layer ``index``: zeros after the layers that have no level."""
        if deepstack is None:
            return None
        levels = len(deepstack)
        return jnp.where(index < levels, jnp.asarray(deepstack)[jnp.minimum(index, levels - 1)], 0)

    def head(self, x: Float[ArrayLike, "batch tokens width"], probe: Probe) -> Float[Array, "batch tokens vocab"]:
        """The logits from the output of the last layer: the final norm, which is a site, and the unembedding."""
        return self.logits(probe("text.norm", self.norm(x)))

    def logits(self, x: Float[ArrayLike, "*rows width"]) -> Float[Array, "*rows vocab"]:
        """The logits from the output of the final norm."""
        if self.lm_head is None:
            rows = jnp.asarray(x).reshape(-1, x.shape[-1])
            logits = product("rd,vd->rv", rows, self.embed_tokens.weight[...]).reshape(*x.shape[:-1], -1)
        else:
            logits = self.lm_head(x)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def unembedding(self, tokens: Int[ArrayLike, "*rows"]) -> Float[Array, "*rows width"]:
        """The vectors whose product with the final norm's output is the logit of each token, before the softcap."""
        if self.lm_head is None:
            return self.embed_tokens(tokens)
        return jnp.moveaxis(self.lm_head.kernel[...][:, tokens], 0, -1)
