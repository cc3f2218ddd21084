"""The attention of the text after the image (P1, section 3.1): equations 1 and 2, and the curves of figures 2 and 3."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from interventions.kinds.groups import GROUPS, bind, label, members
from vlm_jax import Inputs, Model, Tap
from vlm_jax.acting import acting
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.prompts import Batch, batches, positions
from vlm_jax.runs.processes import fetch, progress
from vlm_jax.sites import Context, Intervention
from vlm_jax.typing import Array, ArrayLike

_IMAGE = GROUPS.index("image")
#: S of P1: the end-of-image token or, in a model with registers, the registers.
_END = members("image_end+register")


class Reading(NamedTuple):
    """The attention of the text after the image. T is the set of its tokens; probabilities are summed over i in T."""

    mass: Float[np.ndarray, "samples layers heads groups"]
    """The attention to each of :data:`GROUPS`, f of equation 1 by layer and head. Its sum over groups
    is |T|."""
    tokens: Int[np.ndarray, "samples groups"]
    """The number of tokens of each group."""
    received: Float[np.ndarray, "samples layers image_tokens"]
    """The attention to each image token, mean over heads; NaN where a sample has fewer tokens."""

    @property
    def of_image(self) -> bool:
        """Whether any text attends to the image. None does where registers hide it."""
        return bool((self.mass[..., _IMAGE] > 0).any())

    def share(self, group: str) -> Float[np.ndarray, "samples layers heads"]:
        """The share of the text's attention that goes to a group: equation 1 divided by |T|."""
        text = self.tokens[:, members("text")].sum(1)
        return self.mass[..., members(group)].sum(-1) / text[:, None, None]

    def ratio(self) -> Float[np.ndarray, "samples layers"]:
        """Equation 2, from sums over heads: attention to the image, divided by attention to the image and
        the end of the image, or the registers."""
        image, end = self.mass[..., _IMAGE].sum(-1), self.mass[..., _END].sum((-2, -1))
        with np.errstate(invalid="ignore"):  # a layer with a sliding window may see neither
            return image / (image + end)

    def uniform(self) -> Float[np.ndarray, "samples"]:
        """The value of equation 2 if all tokens of image and end of image, or registers, get equal attention."""
        return self.tokens[:, _IMAGE] / (self.tokens[:, _IMAGE] + self.tokens[:, _END].sum(1))

    def cumulative(self, grid: Float[np.ndarray, "points"]) -> Float[np.ndarray, "samples layers points"]:
        """The share of the image's attention that goes to its most attended tokens, where
        ``grid`` is the share of image tokens (figures 2 and 3)."""
        return np.array(
            [[np.interp(grid, *_curve(layer)) for layer in sample] for sample in self.received], self.received.dtype
        )

    def needed(self, part: float) -> Float[np.ndarray, "samples layers"]:
        """The smallest share of the image tokens that together get ``part`` of the image's attention."""

        def smallest(tokens, attention):
            return np.nan if np.isnan(attention).any() else tokens[np.argmax(attention >= part)]

        return np.array([[smallest(*_curve(layer)) for layer in sample] for sample in self.received])


def _curve(received: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cumulative shares of the tokens and of their attention, most attended first, each from 0 to 1."""
    total = np.cumsum(np.sort(received[~np.isnan(received)].astype(np.float64))[::-1])
    with np.errstate(invalid="ignore"):
        return np.arange(len(total) + 1) / len(total), np.concatenate([[0.0], total / total[-1]])


def text_attention(model: Model, batch: Batch, interventions: Sequence[Intervention] = ()) -> Reading:
    """The attention of the text after the image: in the prompt, and in the answer if the batch has it.

    The probabilities are summed over the text layer by layer, and in a long prompt block by block of queries, so
    those of all tokens and layers are never held at once.

    Args:
        interventions: those that act on the model, bound to the batch.

    Raises:
        UserError: if a row has no image.
    """
    labels = label(batch)
    text, image = np.isin(labels, members("text")), labels == _IMAGE
    if not image.any(1).all():
        raise UserError(f"row {int(np.argmin(image.any(1)))} has no image for its text to read: leave it out")
    summed = fetch(_summed(model, batch.inputs, text, acting(interventions, model.depths))).transpose(1, 0, 2, 3)
    groups = labels[:, None] == np.arange(len(GROUPS))[:, None]  # (B, G, T)
    index, valid = positions(image)
    received = np.take_along_axis(summed.mean(2), index[:, None], 2)
    return Reading(
        np.einsum("blht,bgt->blhg", summed, groups), groups.sum(-1), np.where(valid[:, None], received, np.nan)
    )


@jax.jit
def _summed(
    model: Model, inputs: Inputs, text: Bool[ArrayLike, "batch tokens"], interventions: tuple[Intervention, ...]
) -> Float[Array, "layers batch heads tokens"]:
    """The attention probabilities, summed over the queries that ``text`` marks."""

    def summed(probs: jax.Array, ctx: Context) -> jax.Array:
        return jnp.einsum("bhst,bs->bht", probs, ctx.tokens(jnp.asarray(text, probs.dtype), probs.shape[2]))

    return model(inputs, interventions, taps={"text.attn_probs": Tap(add=summed)}).taps["text.attn_probs"]


def read_examples(
    model: Model,
    processor: Processor,
    examples: list[Example],
    size: int = 16,
    name: str = "",
    *,
    interventions: Sequence[Intervention] = (),
) -> Reading:
    """:func:`text_attention` of every example's prompt, without an answer. Interventions that name token groups are
    bound to every batch."""
    readings: dict[int, tuple] = {}
    for rows, batch in encoded(model, processor, examples, size, f"attention {name}", with_answer=False):
        reading = text_attention(model, batch, bind(interventions, batch))
        readings |= zip(rows, zip(*reading, strict=True), strict=False)
    mass, tokens, received = zip(*(readings[row] for row in range(len(examples))), strict=True)
    most = max(layers.shape[1] for layers in received)
    padded = [np.pad(r, [(0, 0), (0, most - r.shape[1])], constant_values=np.nan) for r in received]
    return Reading(*map(np.stack, (mass, tokens, padded)))


def encoded(
    model: Model, processor: Processor, examples: Sequence[Example], size: int, name: str, **options: Any
) -> Iterator[tuple[list[int], Batch]]:
    """:func:`vlm_jax.prompts.batches` with a progress bar that is labelled ``name``."""
    with progress(total=len(examples), desc=name.strip(), unit="sample", leave=False) as bar:
        for rows, batch in batches(examples, processor, model.config, size, **options):
            yield rows, batch
            bar.update(len(rows))
