"""Qwen3-VL's vision tower: interpolated position embeddings, 2-D rotary, DeepStack mergers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vlm_jax.config import VisionConfig
from vlm_jax.inputs import Images
from vlm_jax.layers import Embedding, LayerNorm, Linear, attend, rotate
from vlm_jax.rope import rope_2d
from vlm_jax.sites import BLOCK_SITES, Context, Probe


class Features(NamedTuple):
    """Visual tokens in the decoder's width: merged ``(I, P / merge, D)``, deepstack ``(K, I, P / merge, D)``."""

    merged: jax.Array
    deepstack: jax.Array


class Attention(nnx.Module):
    def __init__(self, key, config: VisionConfig):
        qkv, proj = jax.random.split(key)
        width = config.hidden_size
        self.heads = config.num_heads
        self.qkv = Linear(qkv, width, 3 * width, bias=True)
        self.proj = Linear(proj, width, width, bias=True)

    def __call__(self, x, rope, mask, probe: Probe):
        images, patches, _ = x.shape
        qkv = probe.linear("visual.attn.qkv", self.qkv, x).reshape(images, patches, 3, self.heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        out = attend(rotate(q, *rope), rotate(k, *rope), v, mask, probe, "visual")
        return probe.linear("visual.attn.proj", self.proj, out)


class MLP(nnx.Module):
    def __init__(self, key, config: VisionConfig):
        fc1, fc2 = jax.random.split(key)
        self.linear_fc1 = Linear(fc1, config.hidden_size, config.intermediate_size, bias=True)
        self.linear_fc2 = Linear(fc2, config.intermediate_size, config.hidden_size, bias=True)

    def __call__(self, x, probe: Probe):
        hidden = jax.nn.gelu(probe.linear("visual.mlp.linear_fc1", self.linear_fc1, x), approximate=True)
        return probe.linear("visual.mlp.linear_fc2", self.linear_fc2, hidden)


class Block(nnx.Module):
    def __init__(self, key, config: VisionConfig):
        attn, mlp = jax.random.split(key)
        self.norm1 = LayerNorm(config.hidden_size)
        self.norm2 = LayerNorm(config.hidden_size)
        self.attn = Attention(attn, config)
        self.mlp = MLP(mlp, config)

    def __call__(self, x, rope, mask, probe: Probe):
        x = probe("visual.resid_pre", x)
        x = x + probe("visual.attn_out", self.attn(self.norm1(x), rope, mask, probe))
        x = x + probe("visual.mlp_out", self.mlp(self.norm2(x), probe))
        return probe("visual.resid_post", x)


class PatchMerger(nnx.Module):
    """``merge`` neighbouring patches become one visual token. GELU is the exact one, unlike in the blocks."""

    def __init__(self, key, config: VisionConfig, use_postshuffle_norm: bool):
        fc1, fc2 = jax.random.split(key)
        width = config.hidden_size * config.merge
        self.merge, self.use_postshuffle_norm = config.merge, use_postshuffle_norm
        self.norm = LayerNorm(width if use_postshuffle_norm else config.hidden_size)
        self.linear_fc1 = Linear(fc1, width, width, bias=True)
        self.linear_fc2 = Linear(fc2, width, config.out_hidden_size, bias=True)

    def __call__(self, x):
        images, patches, width = x.shape
        if not self.use_postshuffle_norm:
            x = self.norm(x)
        x = x.reshape(images, patches // self.merge, self.merge * width)
        if self.use_postshuffle_norm:
            x = self.norm(x)
        return self.linear_fc2(jax.nn.gelu(self.linear_fc1(x), approximate=False))


class VisionTower(nnx.Module):
    def __init__(self, key, config: VisionConfig):
        patch, position, blocks, merger, deepstack = jax.random.split(key, 5)
        self.config = config
        self.patch_embed = Linear(patch, config.patch_dim, config.hidden_size, bias=True)
        self.pos_embed = Embedding(position, config.num_position_embeddings, config.hidden_size)
        self.blocks = jax.vmap(lambda k: Block(k, config))(jax.random.split(blocks, config.depth))
        self.merger = PatchMerger(merger, config, use_postshuffle_norm=False)
        self.deepstack_merger_list = jax.vmap(lambda k: PatchMerger(k, config, use_postshuffle_norm=True))(
            jax.random.split(deepstack, len(config.deepstack_visual_indexes))
        )

    def __call__(self, images: Images, interventions=(), taps: frozenset[str] = frozenset()):
        """Visual tokens of every image.

        Returns:
            Features, and the taps: ``(I, P, ...)``, those of the blocks with a leading block axis.
        """
        config = self.config
        outer = Probe(interventions, taps, Context())
        dtype = self.patch_embed.kernel[...].dtype
        x = self.patch_embed(images.pixel_values.astype(dtype))
        positions = (self.pos_embed(images.position_index) * images.position_weight[..., None]).sum(2)
        x = outer("visual.embeddings", x + positions.astype(dtype))
        rope = rope_2d(images.grid_positions, config.rope_theta, config.hidden_size // config.num_heads)
        mask = images.patch_mask[:, None, :] & images.patch_mask[:, :, None]

        count = len(config.deepstack_visual_indexes)
        slots = jnp.full(config.depth, count).at[jnp.array(config.deepstack_visual_indexes, int)].set(jnp.arange(count))

        def body(carry, layer):
            x, kept = carry
            block, index, slot = layer
            probe = Probe(interventions, taps & BLOCK_SITES, Context(layer=index))
            x = block(x, rope, mask, probe)
            return (x, kept.at[slot].set(x, mode="drop")), probe.taps

        kept = jnp.zeros((count, *x.shape), dtype)
        (x, kept), block_taps = jax.lax.scan(body, (x, kept), (self.blocks, jnp.arange(config.depth), slots))
        merged = outer("projector.merger", self.merger(x))
        deepstack = jax.vmap(lambda merger, h: merger(h))(self.deepstack_merger_list, kept)
        deepstack = outer("projector.deepstack_merger_list", deepstack)
        return Features(merged, deepstack), {**outer.taps, **block_taps}
