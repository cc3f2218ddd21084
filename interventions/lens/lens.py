"""The logit lens: which words the residual stream stands for after each layer (nostalgebraist 2020).

The final norm and the unembedding are applied to the stream as if the model ended there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from vlm_jax import Inputs, Model, Tap
from vlm_jax.acting import acting
from vlm_jax.errors import UserError
from vlm_jax.sites import Intervention
from vlm_jax.typing import Array, ArrayLike

#: How many logits are held at once. Gemma has 262,144 words, so this is 64 of its tokens, or 64 MiB.
_MOST = 2**24


class Lens(NamedTuple):
    """The words that tokens stand for. The P points are the embeddings, which enter layer 0, and then the residual
    stream after each layer, so P is the number of layers plus 1. The last point is the model's own output."""

    words: Int[Array, "batch points tokens k"]
    """The ids of the likeliest words, the likeliest first."""
    probability: Float[Array, "batch points tokens k"]
    """Their probabilities."""
    gold: Float[Array, "batch points tokens"]
    """The probability of the gold word."""
    rank: Int[Array, "batch points tokens"]
    """The rank of the gold word among all words; 1 is the likeliest."""


def logit_lens(
    model: Model,
    inputs: Inputs,
    at: Int[ArrayLike, "batch tokens"],
    gold: Int[ArrayLike, "batch"],
    *,
    k: int = 5,
    interventions: Any = (),
) -> Lens:
    """Reads the residual stream of some tokens after every layer. Memory does not grow with layers x tokens x words:
    each layer's stream is unembedded a few tokens at a time, and only the result is kept.

    Args:
        at: the positions of the tokens in each row.
        gold: the id of each row's gold word, such as the first token of its answer.
        k: how many of the likeliest words to keep.
        interventions: those that act on the model, bound to the batch.

    Raises:
        UserError: if there are fewer than k words, or if an intervention acts on the final norm.
    """
    check_words(model, k)
    interventions = acting(interventions, model.depths)
    check_unembeds(interventions)
    return _read(model, inputs, jnp.asarray(at), jnp.asarray(gold), interventions, k=k)


def check_words(model: Model, k: int) -> None:
    """Raises a UserError unless the model has k words."""
    words = model.config.text.vocab_size
    if not 1 <= k <= words:
        raise UserError(f"the lens is to keep {k} words of {words}: give a number from 1 to that")


def check_unembeds(interventions: Sequence[Intervention]) -> None:
    """Raises a UserError if an intervention acts on the final norm's output, because then the norm and the unembedding
    are no longer how the model reads its stream."""
    for intervention in interventions:
        if "text.norm" in intervention.sites:
            kind = type(intervention).__name__
            raise UserError(f"{kind} acts on text.norm, through which the residual stream is read: leave it out")


@functools.partial(jax.jit, static_argnames="k")
def _read(
    model: Model,
    inputs: Inputs,
    at: Int[ArrayLike, "batch tokens"],
    gold: Int[ArrayLike, "batch"],
    interventions: tuple[Intervention, ...],
    *,
    k: int,
) -> Lens:
    batch, tokens = at.shape
    golds = jnp.repeat(gold, tokens)

    def words(x: jax.Array, gold: jax.Array) -> Lens:
        """Of vectors ``(rows, width)`` and a gold word for each."""
        logits = model.unembed(x).astype(jnp.float32)
        of_gold = jnp.take_along_axis(logits, gold[:, None], 1)
        total = jax.nn.logsumexp(logits, -1, keepdims=True)
        top, ids = jax.lax.top_k(logits, k)
        rank = 1 + (logits > of_gold).sum(1, dtype=jnp.int32)
        return Lens(ids, jnp.exp(top - total), jnp.exp(of_gold - total)[:, 0], rank)

    def kept(value: jax.Array) -> Lens:
        rows = jnp.take_along_axis(value, at[..., None], 1).reshape(batch * tokens, -1)
        found = _in_chunks(words, max(1, _MOST // model.config.text.vocab_size), rows, golds)
        return jax.tree.map(lambda a: a.reshape(batch, tokens, *a.shape[1:]), found)

    sites = ("text.embeddings", "text.resid_post")
    taps = model(inputs, interventions, dict.fromkeys(sites, Tap(reduce=kept))).taps
    joined = jax.tree.map(lambda first, layers: jnp.concatenate([first[None], layers]), *map(taps.get, sites))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), joined)


def _in_chunks(function: Callable[..., Any], size: int, *arrays: jax.Array) -> Any:
    """A function of rows, applied to at most ``size`` rows at a time."""
    rows = len(arrays[0])
    if rows <= size:
        return function(*arrays)
    chunks = -(-rows // size)
    padded = [jnp.pad(a, [(0, chunks * size - rows), *[(0, 0)] * (a.ndim - 1)]) for a in arrays]
    out = jax.lax.map(lambda chunk: function(*chunk), tuple(a.reshape(chunks, size, *a.shape[1:]) for a in padded))
    return jax.tree.map(lambda a: a.reshape(chunks * size, *a.shape[2:])[:rows], out)
