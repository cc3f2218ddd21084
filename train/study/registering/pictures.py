"""Pictures of fewer tokens, without training: means of visual tokens, and the visual tokens that text attends to."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from interventions.flow.shares import text_attention
from interventions.kinds.attention import AttentionKnockout
from interventions.kinds.groups import GROUPS, label
from vlm_jax import Inputs, Model
from vlm_jax.errors import UserError
from vlm_jax.prompts import Batch
from vlm_jax.sites import Context, Intervention
from vlm_jax.typing import ArrayLike


@flax.struct.dataclass
class Averaged(Intervention):
    """Replaces tokens of the prompt by the mean of their block. ``block (B, T)`` numbers the blocks of a row from 1; 0
    leaves a token as it is."""

    block: Int[ArrayLike, "batch tokens"]
    at: tuple[str, ...] = flax.struct.field(pytree_node=False, default=("text.embeddings",))

    @property
    def sites(self) -> frozenset[str]:
        return frozenset(self.at)

    def __call__(self, site: str, value: jax.Array, ctx: Context) -> jax.Array:
        if ctx.decoding:
            return value
        block = jnp.asarray(self.block)
        same = (block[:, :, None] == block[:, None, :]) & (block[:, :, None] > 0)
        mean = jnp.einsum("bst,btd->bsd", same.astype(value.dtype), value) / jnp.maximum(same.sum(-1), 1)[..., None]
        return jnp.where(block[..., None] > 0, mean, value)


def blocks_of(is_image: Bool[np.ndarray, "batch tokens"], count: int) -> Int[np.ndarray, "batch tokens"]:
    """The visual tokens of each row in ``count`` blocks of neighbours in reading order, of nearly equal size.

    Raises:
        UserError: if a row has an image with fewer tokens.
    """
    sizes = is_image.sum(1, keepdims=True)
    if sizes.min() < count:
        raise UserError(f"a picture has {sizes.min()} visual tokens, so {count} cannot be made of it: ask for fewer")
    place = np.cumsum(is_image, 1) - 1
    return np.where(is_image, 1 + place * count // sizes, 0).astype(np.int32)


def pooled(model: Model, batch: Batch, count: int) -> tuple[Inputs, tuple[Any, ...]]:
    """The inputs and interventions with which each picture is ``count`` tokens: means of neighbours. A mean has the
    position of the first of its block; the others are not seen."""
    inputs, is_image = batch.inputs, np.asarray(batch.inputs.is_image)
    block = blocks_of(is_image, count)
    first = is_image & (block != np.pad(block, [(0, 0), (1, 0)])[:, :-1])
    sites = [site for site in ("text.embeddings", "text.deepstack") if site in model.sites(inputs)]
    seen = np.asarray(inputs.attention_mask) & (first | ~is_image)
    return inputs.replace(attention_mask=seen), (Averaged(block, tuple(sites)),)


def most_attended(model: Model, batch: Batch, count: int, layer: int) -> tuple[Inputs, tuple[Any, ...]]:
    """The inputs and interventions with which layers behind ``layer`` see only the ``count`` visual tokens of each
    picture to which its text attends most in this layer (mean over heads, sum over the prompt's text)."""
    labels, is_image = label(batch), np.asarray(batch.inputs.is_image)
    blocks_of(is_image, count)  # refuses pictures that are too small
    received = text_attention(model, batch).received[:, layer]  # (B, visual tokens), NaN at the end
    rank = np.argsort(np.argsort(-np.nan_to_num(received, nan=-1.0), 1), 1)
    dropped = np.zeros_like(is_image)
    dropped[is_image] = np.concatenate([row[:size] >= count for row, size in zip(rank, is_image.sum(1), strict=True)])
    if not dropped.any():
        return batch.inputs, ()
    names = (*GROUPS, "dropped")
    keep = np.ones((model.depths["text"], len(names), len(names)), np.float32)
    keep[layer + 1 :, :, -1] = 0
    cut = AttentionKnockout(
        keep, np.where(dropped, len(GROUPS), labels).astype(np.int32), mode="pre_softmax", group_names=names
    )
    return batch.inputs, (cut,)
