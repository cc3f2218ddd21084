"""Qwen3-VL's vision tower: interpolated position embeddings, 2-D rotary, DeepStack mergers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Float32, Int32, PRNGKeyArray

from vlm_jax.inputs import Images
from vlm_jax.nn.layers import ACTIVATIONS, Embedding, LayerNorm, Linear
from vlm_jax.nn.rope import rope_2d
from vlm_jax.sites import NO_TAPS, Context, Probe, Tap, tower_sites
from vlm_jax.typing import Array, ArrayLike
from vlm_jax.vision.blocks import Features, scan_blocks
from vlm_jax.vision.qwen import Attention, QwenVision, Rope2d


@dataclasses.dataclass(frozen=True)
class Qwen3Vision(QwenVision):
    """Qwen3-VL's tower.

    num_position_embeddings: of a square grid, which is interpolated to the size of each image.
    deepstack_visual_indexes: the blocks whose outputs DeepStack adds after the decoder's first layers, in order.
    """

    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]

    def tower(self, key: PRNGKeyArray) -> "VisionTower":
        return VisionTower(key, self)

    def images(
        self, pixel_values: Float[np.ndarray, "all_patches patch_dim"], image_grid_thw: Any
    ) -> tuple[Images, list[int]]:
        images, counts = super().images(pixel_values, image_grid_thw)
        assert images.grid_positions is not None
        index = np.zeros((*images.patch_mask.shape, 4), np.int32)
        weight = np.zeros(index.shape, np.float32)
        side = int(self.num_position_embeddings**0.5)
        for i, (_, height, width) in enumerate(np.asarray(image_grid_thw, int).reshape(-1, 3).tolist()):
            n = counts[i] * self.merge
            row, column = images.grid_positions[i, :n].T
            index[i, :n], weight[i, :n] = bilinear(
                np.linspace(0, side - 1, height, dtype=np.float32)[row],
                np.linspace(0, side - 1, width, dtype=np.float32)[column],
                side,
            )
        return images.replace(position_index=index, position_weight=weight), counts


def bilinear(
    row: Float32[np.ndarray, " points"], column: Float32[np.ndarray, " points"], side: int
) -> tuple[Int32[np.ndarray, "points 4"], Float32[np.ndarray, "points 4"]]:
    """The four cells of a ``side x side`` grid around each point, as flat indexes, and their interpolation weights."""
    top, left = row.astype(int), column.astype(int)
    down, right = np.minimum(top + 1, side - 1), np.minimum(left + 1, side - 1)
    y, x = row - top, column - left
    index = np.stack([top * side + left, top * side + right, down * side + left, down * side + right], -1)
    weight = np.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], -1)
    return index.astype(np.int32), weight.astype(np.float32)


class MLP(nnx.Module):
    def __init__(self, key: PRNGKeyArray, config: Qwen3Vision):
        fc1, fc2 = jax.random.split(key)
        self.hidden_act = config.hidden_act
        self.linear_fc1 = Linear(fc1, config.hidden_size, config.intermediate_size, bias=True)
        self.linear_fc2 = Linear(fc2, config.intermediate_size, config.hidden_size, bias=True)

    def __call__(
        self, x: Float[ArrayLike, "images patches width"], probe: Probe
    ) -> Float[Array, "images patches width"]:
        hidden = ACTIVATIONS[self.hidden_act](probe.linear("visual.mlp.linear_fc1", self.linear_fc1, x))
        return probe.linear("visual.mlp.linear_fc2", self.linear_fc2, hidden)


class Block(nnx.Module):
    def __init__(self, key: PRNGKeyArray, config: Qwen3Vision):
        attn, mlp = jax.random.split(key)
        self.norm1 = LayerNorm(config.hidden_size)
        self.norm2 = LayerNorm(config.hidden_size)
        self.attn = Attention(attn, config)
        self.mlp = MLP(mlp, config)

    def __call__(
        self,
        x: Float[ArrayLike, "images patches width"],
        rope: Rope2d,
        mask: Bool[ArrayLike, "images patches patches"],
        probe: Probe,
    ) -> Float[Array, "images patches width"]:
        x = probe("visual.resid_pre", x)
        x = x + probe("visual.attn_out", self.attn(self.norm1(x), rope, mask, probe))
        x = x + probe("visual.mlp_out", self.mlp(self.norm2(x), probe))
        return probe("visual.resid_post", x)


class PatchMerger(nnx.Module):
    """Makes one visual token of ``merge`` neighbouring patches. Its GELU is the exact one, unlike the blocks'.

    use_postshuffle_norm: norms the merged patches together, not each patch by itself.
    """

    def __init__(self, key: PRNGKeyArray, config: Qwen3Vision, use_postshuffle_norm: bool):
        fc1, fc2 = jax.random.split(key)
        width = config.hidden_size * config.merge
        self.merge, self.use_postshuffle_norm = config.merge, use_postshuffle_norm
        self.norm = LayerNorm(width if use_postshuffle_norm else config.hidden_size)
        self.linear_fc1 = Linear(fc1, width, width, bias=True)
        self.linear_fc2 = Linear(fc2, width, config.out_hidden_size, bias=True)

    def __call__(
        self, x: Float[ArrayLike, "images patches width"], probe: Probe, site: str
    ) -> Float[Array, "images tokens out_width"]:
        """The visual tokens. ``site`` is the beginning of the linears' sites."""
        images, patches, width = x.shape
        if not self.use_postshuffle_norm:
            x = self.norm(x)
        x = x.reshape(images, patches // self.merge, self.merge * width)
        if self.use_postshuffle_norm:
            x = self.norm(x)
        hidden = ACTIVATIONS["gelu"](probe.linear(f"{site}.linear_fc1", self.linear_fc1, x))
        return probe.linear(f"{site}.linear_fc2", self.linear_fc2, hidden)


class VisionTower(nnx.Module):
    SITES = tower_sites(
        "qwen3",
        *(
            f"{merger}{linear}"
            for merger in ("merger", "deepstack_merger_list")
            for linear in ("", ".linear_fc1", ".linear_fc2")
        ),
    )

    def __init__(self, key: PRNGKeyArray, config: Qwen3Vision):
        patch, position, blocks, merger, deepstack = jax.random.split(key, 5)
        self.config = config
        self.patch_embed = Linear(patch, config.patch_dim, config.hidden_size, bias=True)
        self.pos_embed = Embedding(position, config.num_position_embeddings, config.hidden_size)
        self.blocks = jax.vmap(lambda k: Block(k, config))(jax.random.split(blocks, config.depth))
        self.merger = PatchMerger(merger, config, use_postshuffle_norm=False)
        self.deepstack_merger_list = jax.vmap(lambda k: PatchMerger(k, config, use_postshuffle_norm=True))(
            jax.random.split(deepstack, len(config.deepstack_visual_indexes))
        )

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
        assert images.position_weight is not None, "these images are for another tower"
        outer = Probe(interventions, taps, Context())
        dtype = self.blocks.norm1.weight.dtype
        x = self.patch_embed(images.pixel_values.astype(dtype))
        positions = (self.pos_embed(images.position_index) * images.position_weight[..., None]).sum(2)
        x = outer("visual.embeddings", x + positions.astype(dtype))
        rope = rope_2d(images.grid_positions, config.rope_theta, config.hidden_size // config.num_heads)
        mask = images.patch_mask[:, None, :] & images.patch_mask[:, :, None]
        x, kept, block_taps = scan_blocks(
            self.blocks,
            x,
            lambda block, x, _, probe: block(x, rope, mask, probe),
            keep=config.deepstack_visual_indexes,
            interventions=interventions,
            taps=taps,
            frozen=frozen,
        )
        merged = outer("projector.merger", self.merger(x, outer, "projector.merger"))

        def level(merger: PatchMerger, h: jax.Array, index: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
            probe = Probe(interventions, taps, Context(index))
            return merger(h, probe, "projector.deepstack_merger_list"), probe.taps

        deepstack, level_taps = jax.vmap(level)(self.deepstack_merger_list, kept, jnp.arange(len(kept)))
        for site, value in level_taps.items():
            layers = taps[site].layers
            level_taps[site] = value if layers is None else jax.tree.map(lambda a, at=layers: a[jnp.array(at)], value)
        deepstack = outer("projector.deepstack_merger_list", deepstack)
        return Features(merged, deepstack), {**outer.taps, **level_taps, **block_taps}
