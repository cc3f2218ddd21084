"""LLaVA's vision tower: CLIP, of which one or several hidden layers are read, and a projector of one or two layers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, PRNGKeyArray

from vlm_jax.inputs import Images
from vlm_jax.nn.layers import ACTIVATIONS, Embedding, LayerNorm, Linear
from vlm_jax.sites import NO_TAPS, Context, Probe, Tap, tower_sites
from vlm_jax.typing import Array, ArrayLike
from vlm_jax.vision.blocks import Features, scan_blocks
from vlm_jax.vision.vit import ViTVision, encoder_layers


@dataclasses.dataclass(frozen=True)
class ClipVision(ViTVision):
    """LLaVA's tower.

    vision_feature_layer: the hidden states that are read. 0 is the embeddings; negative ones count from the last.
    keep_cls: whether the class token is one of the visual tokens (``vision_feature_select_strategy`` "full").
    mm_projector_type: "mlp2x_gelu" for two linears with ``projector_hidden_act`` between them, or "linear" for one.
    """

    vision_feature_layer: tuple[int, ...]
    keep_cls: bool
    mm_projector_type: str
    projector_hidden_act: str
    projector_bias: bool

    @property
    def tokens(self) -> int:
        return self.side**2 + self.keep_cls

    @property
    def class_tokens(self) -> int:
        return 1

    def tower(self, key: PRNGKeyArray) -> "VisionTower":
        return VisionTower(key, self)

    @property
    def hidden_states(self) -> tuple[int, ...]:
        """``vision_feature_layer`` with negative numbers resolved."""
        return tuple(layer % (self.depth + 1) for layer in self.vision_feature_layer)


class Projector(nnx.Module):
    def __init__(self, key: PRNGKeyArray, config: ClipVision):
        first, second = jax.random.split(key)
        self.act = config.projector_hidden_act
        width = config.hidden_size * len(config.vision_feature_layer)
        self.linear_1 = Linear(first, width, config.out_hidden_size, config.projector_bias)
        outputs = config.out_hidden_size
        two = config.mm_projector_type != "linear"
        self.linear_2 = Linear(second, outputs, outputs, config.projector_bias) if two else None

    def __call__(
        self, x: Float[ArrayLike, "images tokens width"], probe: Probe
    ) -> Float[Array, "images tokens out_width"]:
        x = probe.linear("projector.linear_1", self.linear_1, x)
        if self.linear_2 is None:
            return x
        return probe.linear("projector.linear_2", self.linear_2, ACTIVATIONS[self.act](x))


class VisionTower(nnx.Module):
    """Only the layers up to the highest hidden state that is read are run; the others are kept for saving."""

    def __init__(self, key: PRNGKeyArray, config: ClipVision):
        patch, position, layers, projector = jax.random.split(key, 4)
        self.config = config
        self.class_embedding = nnx.Param(jnp.zeros(config.hidden_size))
        self.patch_embedding = Linear(patch, config.patch_dim, config.hidden_size)
        self.position_embedding = Embedding(position, config.side**2 + 1, config.hidden_size)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = encoder_layers(layers, config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.multi_modal_projector = Projector(projector, config)

    @property
    def SITES(self) -> frozenset[str]:
        projector = ("linear_1", "linear_2") if self.multi_modal_projector.linear_2 is not None else ("linear_1",)
        return tower_sites("vit", *projector)

    @property
    def depth(self) -> int:
        """How many layers are run: those up to the highest hidden state that is read."""
        return max(self.config.hidden_states)

    def __call__(
        self, images: Images, interventions: Sequence[Any] = (), taps: Mapping[str, Tap] = NO_TAPS, frozen: int = 0
    ) -> tuple[Features, dict[str, Any]]:
        """Visual tokens of every image. A backward pass does not run through the first ``frozen`` blocks.

        Returns:
            Features, and the taps ``(images, 1 + patches, ...)`` with the class token first; those of the layers have a
            leading axis of the layers that are run.
        """
        config = self.config
        outer = Probe(interventions, taps, Context())
        x = self.patch_embedding(images.pixel_values.astype(self.pre_layrnorm.weight.dtype))
        cls = jnp.broadcast_to(self.class_embedding[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], 1) + self.position_embedding.weight[...]
        x = outer("visual.embeddings", self.pre_layrnorm(x))
        hidden = sorted(set(config.hidden_states))
        _, kept, layer_taps = scan_blocks(
            jax.tree.map(lambda a: a[: self.depth], self.layers),
            x,
            lambda layer, x, _, probe: layer(x, probe),
            keep=tuple(h - 1 for h in hidden if h),
            interventions=interventions,
            taps=taps,
            frozen=frozen,
        )
        states = dict(zip([h for h in hidden if h], kept, strict=True)) | {0: x}
        features = jnp.concatenate([states[h] for h in config.hidden_states], -1)
        features = self.multi_modal_projector(features if config.keep_cls else features[:, 1:], outer)
        return Features(features), {**outer.taps, **layer_taps}
