"""Gemma 3's vision tower: SigLIP, and a projector that pools neighbouring patches."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, PRNGKeyArray

from vlm_jax.inputs import Images
from vlm_jax.nn.layers import Embedding, LayerNorm, Linear, RMSNorm
from vlm_jax.sites import NO_TAPS, Context, Probe, Tap, tower_sites
from vlm_jax.typing import Array, ArrayLike
from vlm_jax.vision.blocks import Features, scan_blocks
from vlm_jax.vision.vit import ViTVision, encoder_layers


@dataclasses.dataclass(frozen=True)
class SiglipVision(ViTVision):
    """Gemma 3's tower.

    mm_tokens_per_image: visual tokens of an image, a square number.
    """

    mm_tokens_per_image: int

    @property
    def tokens(self) -> int:
        return self.mm_tokens_per_image

    def tower(self, key: PRNGKeyArray) -> "VisionTower":
        return VisionTower(key, self)


class Projector(nnx.Module):
    """Average-pools the patches to ``mm_tokens_per_image``, norms them, and maps them to the decoder's width."""

    def __init__(self, key: PRNGKeyArray, config: SiglipVision):
        self.side, self.pooled = config.side, int(config.mm_tokens_per_image**0.5)
        self.mm_soft_emb_norm = RMSNorm(config.hidden_size, config.layer_norm_eps, unit_offset=True)
        self.mm_input_projection = Linear(key, config.hidden_size, config.out_hidden_size)

    def __call__(
        self, x: Float[ArrayLike, "images patches width"], probe: Probe
    ) -> Float[Array, "images tokens out_width"]:
        images, _, width = x.shape
        block = self.side // self.pooled
        x = x.reshape(images, self.side, self.side, width)[:, : block * self.pooled, : block * self.pooled]
        x = x.reshape(images, self.pooled, block, self.pooled, block, width).mean((2, 4), dtype=jnp.float32)
        x = x.astype(self.mm_soft_emb_norm.weight.dtype).reshape(images, self.pooled**2, width)
        x = probe("projector.mm_soft_emb_norm", self.mm_soft_emb_norm(x))
        return probe.linear("projector.mm_input_projection", self.mm_input_projection, x)


class VisionTower(nnx.Module):
    SITES = tower_sites("vit", "mm_soft_emb_norm", "mm_input_projection")

    def __init__(self, key: PRNGKeyArray, config: SiglipVision):
        patch, position, layers, projector = jax.random.split(key, 4)
        self.config = config
        self.patch_embedding = Linear(patch, config.patch_dim, config.hidden_size, bias=True)
        self.position_embedding = Embedding(position, config.side**2, config.hidden_size)
        self.layers = encoder_layers(layers, config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.multi_modal_projector = Projector(projector, config)

    @property
    def depth(self) -> int:
        return self.config.depth

    def __call__(
        self, images: Images, interventions: Sequence[Any] = (), taps: Mapping[str, Tap] = NO_TAPS, frozen: int = 0
    ) -> tuple[Features, dict[str, Any]]:
        """Visual tokens of every image. A backward pass does not run through the first ``frozen`` blocks.

        Returns:
            Features, and the taps ``(images, patches, ...)``; those of the layers have a leading axis of layers.
        """
        outer = Probe(interventions, taps, Context())
        x = self.patch_embedding(images.pixel_values.astype(self.post_layernorm.weight.dtype))
        x = outer("visual.embeddings", x + self.position_embedding.weight[...])
        x, _, layer_taps = scan_blocks(
            self.layers,
            x,
            lambda layer, x, _, probe: layer(x, probe),
            interventions=interventions,
            taps=taps,
            frozen=frozen,
        )
        features = self.multi_modal_projector(self.post_layernorm(x), outer)
        return Features(features), {**outer.taps, **layer_taps}
