"""What single tokens attend to, for the result page to lay over the picture (beside P1's sums over them)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from interventions.kinds.groups import bind
from vlm_jax import Inputs, Model, Tap
from vlm_jax.acting import acting
from vlm_jax.data import Example
from vlm_jax.inputs import bucket
from vlm_jax.processor import Processor
from vlm_jax.prompts import encode
from vlm_jax.runs.processes import fetch
from vlm_jax.runs.token_maps import TokenMap
from vlm_jax.seen import read_prompt
from vlm_jax.sites import Context, Intervention
from vlm_jax.typing import Array, ArrayLike

#: The most numbers that are kept of a sample. With more, the heads are left out, and only their mean is kept.
_MOST = 4_000_000
#: Numbers of queries are rounded up to a multiple of this, so that few programs are compiled.
_STEP = 32


def attention_maps(
    model: Model, processor: Processor, examples: Sequence[Example], interventions: Sequence[Intervention] = ()
) -> tuple[list[TokenMap], list[str]]:
    """The attention probabilities of every token of text behind the beginning of the first image, in every layer, and
    the names of the maps: the mean of the heads and, if no sample has too many numbers, each head.

    Args:
        interventions: those that act on the model. Those that name token groups are bound to every prompt.
    """
    encoded = [encode([example], processor, model.config, with_answer=False) for example in examples]
    queries = []
    for batch in encoded:
        is_visual, real = np.asarray(batch.spans["image"])[0], np.asarray(batch.inputs.attention_mask)[0]
        behind = np.arange(len(real)) >= is_visual.argmax()  # all tokens of a prompt without an image
        queries.append(np.flatnonzero(behind & real & ~is_visual))
    text = model.config.text
    heads = [f"head {head}" for head in range(text.num_attention_heads)]
    largest = max(len(rows) * int(b.inputs.attention_mask.sum()) for rows, b in zip(queries, encoded, strict=True))
    with_heads = (len(heads) + 1) * text.num_hidden_layers * largest <= _MOST
    found = []
    for example, batch, rows in zip(examples, encoded, queries, strict=True):
        padded = np.pad(rows, (0, bucket(len(rows), _STEP) - len(rows)))
        always = acting(bind(interventions, batch), model.depths)
        values = fetch(_attention(model, batch.inputs, padded, always, with_heads=with_heads))
        real = np.asarray(batch.inputs.attention_mask)[0]
        prompt = read_prompt(batch.inputs, real, model.config, processor)
        numbers = (np.cumsum(real) - 1)[rows]  # of the queries, among the tokens that are kept
        kept = values[:, :, : len(rows)][..., real]
        found.append(TokenMap(example.id, example.task, prompt, kept, numbers.tolist()))
    return found, ["mean of heads", *(heads if with_heads else [])]


@functools.partial(jax.jit, static_argnames="with_heads")
def _attention(
    model: Model,
    inputs: Inputs,
    queries: Int[ArrayLike, " queries"],
    interventions: tuple[Intervention, ...],
    *,
    with_heads: bool,
) -> Float[Array, "layers maps queries tokens"]:
    """The probabilities of the only prompt: their mean over heads, then those of each head."""

    def kept(probs: jax.Array, ctx: Context) -> jax.Array:
        index = queries - ctx.start
        held = (index >= 0) & (index < probs.shape[2])  # the block's own queries; the others are added as zeros
        found = jnp.where(held[:, None], probs[0][:, jnp.where(held, index, 0)], 0)
        mean = found.mean(0, keepdims=True)
        return jnp.concatenate([mean, found]) if with_heads else mean

    return model(inputs, interventions, taps={"text.attn_probs": Tap(add=kept)}).taps["text.attn_probs"]
