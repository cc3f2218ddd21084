"""What SigLIP and CLIP share: images of one size, learned positions, and the encoder layer."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, PRNGKeyArray
from PIL import Image

from vlm_jax.config import VisionConfig
from vlm_jax.errors import UserError
from vlm_jax.inputs import Images
from vlm_jax.nn.layers import ACTIVATIONS, LayerNorm, Linear, attend
from vlm_jax.sites import Probe
from vlm_jax.typing import Array, ArrayLike


@dataclasses.dataclass(frozen=True)
class ViTVision(VisionConfig):
    """A tower for square images of ``image_size`` x ``image_size`` pixels, without padding."""

    image_size: int
    layer_norm_eps: float

    @property
    def side(self) -> int:
        """Patches along the image's side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Visual tokens of an image."""
        raise NotImplementedError

    def size_of(self, image_processor: Any, image: Image.Image) -> tuple[int, int]:
        return self.side**2, self.tokens

    def blank(self, count: int, tokens: int) -> dict[str, np.ndarray]:
        return {"pixel_values": np.zeros((count, self.in_channels, self.image_size, self.image_size), np.float32)}

    def images(self, pixel_values: Float[np.ndarray, "..."], image_grid_thw: Any = None) -> tuple[Images, list[int]]:
        """Cuts ``pixel_values (images, channels, height, width)`` into patches, row by row."""
        size, patch = self.image_size, self.patch_size
        if pixel_values.shape[1:] != (self.in_channels, size, size):
            raise UserError(
                f"pixel_values has shape {pixel_values.shape}, but the tower takes (images, {self.in_channels}, "
                f"{size}, {size}): use the model's own image processor"
            )
        count, side = len(pixel_values), self.side
        patches = pixel_values[:, :, : side * patch, : side * patch]
        patches = patches.reshape(count, self.in_channels, side, patch, side, patch).transpose(0, 2, 4, 1, 3, 5)
        patches = np.ascontiguousarray(patches.reshape(count, side**2, self.patch_dim))
        mask = np.ones(patches.shape[:2], bool)
        return Images(patches, mask, stride=self.tokens), [self.tokens] * count


class SelfAttention(nnx.Module):
    def __init__(self, key: PRNGKeyArray, config: ViTVision):
        q, k, v, out = jax.random.split(key, 4)
        width = config.hidden_size
        self.heads = config.num_heads
        self.q_proj = Linear(q, width, width, bias=True)
        self.k_proj = Linear(k, width, width, bias=True)
        self.v_proj = Linear(v, width, width, bias=True)
        self.out_proj = Linear(out, width, width, bias=True)

    def __call__(self, x: Float[ArrayLike, "images tokens width"], probe: Probe) -> Float[Array, "images tokens width"]:
        heads = (*x.shape[:2], self.heads, -1)
        q = probe.linear("visual.self_attn.q_proj", self.q_proj, x).reshape(heads)
        k = probe.linear("visual.self_attn.k_proj", self.k_proj, x).reshape(heads)
        v = probe.linear("visual.self_attn.v_proj", self.v_proj, x).reshape(heads)
        return probe.linear("visual.self_attn.out_proj", self.out_proj, attend(q, k, v, None, probe, "visual"))


class MLP(nnx.Module):
    def __init__(self, key: PRNGKeyArray, config: ViTVision):
        fc1, fc2 = jax.random.split(key)
        self.hidden_act = config.hidden_act
        self.fc1 = Linear(fc1, config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(fc2, config.intermediate_size, config.hidden_size, bias=True)

    def __call__(self, x: Float[ArrayLike, "images tokens width"], probe: Probe) -> Float[Array, "images tokens width"]:
        hidden = ACTIVATIONS[self.hidden_act](probe.linear("visual.mlp.fc1", self.fc1, x))
        return probe.linear("visual.mlp.fc2", self.fc2, hidden)


class EncoderLayer(nnx.Module):
    def __init__(self, key: PRNGKeyArray, config: ViTVision):
        attn, mlp = jax.random.split(key)
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(attn, config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(mlp, config)

    def __call__(self, x: Float[ArrayLike, "images tokens width"], probe: Probe) -> Float[Array, "images tokens width"]:
        x = probe("visual.resid_pre", x)
        x = x + probe("visual.attn_out", self.self_attn(self.layer_norm1(x), probe))
        x = x + probe("visual.mlp_out", self.mlp(self.layer_norm2(x), probe))
        return probe("visual.resid_post", x)


def encoder_layers(key: PRNGKeyArray, config: ViTVision) -> EncoderLayer:
    """All layers of the encoder: one layer whose arrays have a leading axis of layers."""
    return jax.vmap(lambda k: EncoderLayer(k, config))(jax.random.split(key, config.depth))
