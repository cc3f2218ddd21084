"""Qwen2.5-VL's vision tower: attention inside windows, with a few blocks that see the whole image.

transformers sorts the patches by window, attends within each window and restores the order after the merger. Attention
does not depend on the order, so here the patches stay in place and a mask says which of them share a window. The
attention of large pictures sorts them, computes window by window, and puts them back (:mod:`vlm_jax.nn.windows`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, PRNGKeyArray

from vlm_jax.inputs import Images
from vlm_jax.nn.layers import ACTIVATIONS, Linear, RMSNorm
from vlm_jax.nn.rope import rope_2d
from vlm_jax.nn.windows import Windows
from vlm_jax.sites import NO_TAPS, Context, Probe, Tap, tower_sites
from vlm_jax.typing import Array, ArrayLike
from vlm_jax.vision.blocks import Features, scan_blocks
from vlm_jax.vision.qwen import Attention, QwenVision, Rope2d

_EPS = 1e-6
#: From this many patches on, attention in windows is computed window by window.
_LONG = 1024


@dataclasses.dataclass(frozen=True)
class Qwen25Vision(QwenVision):
    """Qwen2.5-VL's tower.

    window_size: side of an attention window, in pixels. fullatt_block_indexes: the blocks that see the whole image.
    """

    window_size: int
    fullatt_block_indexes: tuple[int, ...]

    @property
    def window_side(self) -> int:
        """Patches along a window's side."""
        return self.window_size // self.spatial_merge_size // self.patch_size * self.spatial_merge_size

    def tower(self, key: PRNGKeyArray) -> "VisionTower":
        return VisionTower(key, self)


class MLP(nnx.Module):
    def __init__(self, key: PRNGKeyArray, config: Qwen25Vision):
        gate, up, down = jax.random.split(key, 3)
        self.hidden_act = config.hidden_act
        self.gate_proj = Linear(gate, config.hidden_size, config.intermediate_size, bias=True)
        self.up_proj = Linear(up, config.hidden_size, config.intermediate_size, bias=True)
        self.down_proj = Linear(down, config.intermediate_size, config.hidden_size, bias=True)

    def __call__(
        self, x: Float[ArrayLike, "images patches width"], probe: Probe
    ) -> Float[Array, "images patches width"]:
        gate = ACTIVATIONS[self.hidden_act](probe.linear("visual.mlp.gate_proj", self.gate_proj, x))
        hidden = gate * probe.linear("visual.mlp.up_proj", self.up_proj, x)
        return probe.linear("visual.mlp.down_proj", self.down_proj, hidden)


class Block(nnx.Module):
    def __init__(self, key: PRNGKeyArray, config: Qwen25Vision):
        attn, mlp = jax.random.split(key)
        self.norm1 = RMSNorm(config.hidden_size, _EPS)
        self.norm2 = RMSNorm(config.hidden_size, _EPS)
        self.attn = Attention(attn, config)
        self.mlp = MLP(mlp, config)

    def __call__(
        self,
        x: Float[ArrayLike, "images patches width"],
        rope: Rope2d,
        mask: Bool[ArrayLike, "images patches patches"],
        probe: Probe,
        windows: Windows | None,
        in_windows: Bool[ArrayLike, ""],
    ) -> Float[Array, "images patches width"]:
        x = probe("visual.resid_pre", x)
        x = x + probe("visual.attn_out", self.attn(self.norm1(x), rope, mask, probe, windows, in_windows))
        x = x + probe("visual.mlp_out", self.mlp(self.norm2(x), probe))
        return probe("visual.resid_post", x)


class PatchMerger(nnx.Module):
    """Makes one visual token of ``merge`` neighbouring patches. Its GELU is the exact one."""

    def __init__(self, key: PRNGKeyArray, config: Qwen25Vision):
        first, second = jax.random.split(key)
        width = config.hidden_size * config.merge
        self.merge = config.merge
        self.ln_q = RMSNorm(config.hidden_size, _EPS)
        self.linear_1 = Linear(first, width, width, bias=True)
        self.linear_2 = Linear(second, width, config.out_hidden_size, bias=True)

    def __call__(
        self, x: Float[ArrayLike, "images patches width"], probe: Probe
    ) -> Float[Array, "images tokens out_width"]:
        images, patches, width = x.shape
        x = self.ln_q(x).reshape(images, patches // self.merge, self.merge * width)
        hidden = ACTIVATIONS["gelu"](probe.linear("projector.merger.linear_1", self.linear_1, x))
        return probe.linear("projector.merger.linear_2", self.linear_2, hidden)


class VisionTower(nnx.Module):
    SITES = tower_sites("qwen2_5", "merger", "merger.linear_1", "merger.linear_2")

    def __init__(self, key: PRNGKeyArray, config: Qwen25Vision):
        patch, blocks, merger = jax.random.split(key, 3)
        self.config = config
        self.patch_embed = Linear(patch, config.patch_dim, config.hidden_size)
        self.blocks = jax.vmap(lambda k: Block(k, config))(jax.random.split(blocks, config.depth))
        self.merger = PatchMerger(merger, config)

    @property
    def depth(self) -> int:
        return self.config.depth

    def __call__(
        self, images: Images, interventions: Sequence[Any] = (), taps: Mapping[str, Tap] = NO_TAPS, frozen: int = 0
    ) -> tuple[Features, dict[str, Any]]:
        """Visual tokens of every image. A backward pass does not run through the first ``frozen`` blocks.

        Returns:
            Features, and the taps ``(images, patches, ...)``; those of the blocks have a leading axis of blocks.
        """
        config = self.config
        assert images.grid_positions is not None, "these images are for another tower"
        outer = Probe(interventions, taps, Context())
        x = self.patch_embed(images.pixel_values.astype(self.blocks.norm1.weight.dtype))
        x = outer("visual.embeddings", x)
        rope = rope_2d(images.grid_positions, config.rope_theta, config.hidden_size // config.num_heads)
        seen = images.patch_mask[:, None, :] & images.patch_mask[:, :, None]
        row, column = jnp.moveaxis(jnp.asarray(images.grid_positions) // config.window_side, -1, 0)
        number = row * (column.max() + 1) + column  # of each patch's window
        same_window = seen & (number[:, None, :] == number[:, :, None])
        windows = None
        if x.shape[1] >= _LONG:
            windows = Windows.of(jnp.where(images.patch_mask, number, -1), config.window_side**2)
        full = np.isin(np.arange(config.depth), config.fullatt_block_indexes)

        def run(block: Block, x: jax.Array, full: jax.Array, probe: Probe) -> jax.Array:
            # Where windows are computed one by one, only the blocks without windows need a mask.
            by_mask = windows is None or probe.meets("visual.attn_scores", "visual.attn_probs")
            mask = jnp.where(full, seen, same_window) if by_mask else seen
            return block(x, rope, mask, probe, None if by_mask else windows, jnp.logical_not(full))

        x, _, block_taps = scan_blocks(
            self.blocks,
            x,
            run,
            each=jnp.asarray(full),
            interventions=interventions,
            taps=taps,
            frozen=frozen,
        )
        merged = outer("projector.merger", self.merger(x, outer))
        return Features(merged), {**outer.taps, **block_taps}
