"""Generation for N variants at once."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from interventions.engine.chunks import chunk_of
from interventions.engine.entry import behind_prefix, embedded, entered
from interventions.engine.prefix import possible_prefix
from interventions.engine.variants import Variants, check_acts, first_token, sized_variants
from vlm_jax import Inputs, Model
from vlm_jax.acting import acting
from vlm_jax.generate import Decoding, check_finite, check_unanswered, continued, decoding
from vlm_jax.sites import check_sites
from vlm_jax.typing import Array


def generate_variants(
    model: Model,
    inputs: Inputs,
    variants: Variants | Sequence[Any],
    max_new_tokens: int,
    *,
    base: Sequence[Any] = (),
    steps: Literal["all", "prefill"] = "all",
    chunk: int | None = None,
) -> Int[Array, "variants batch new_tokens"]:
    """Greedy answers of every variant, of ``max_new_tokens`` tokens: :func:`vlm_jax.generate` for N variants that share
    one copy of the prefix's keys and values.

    Args:
        variants, base: as in :func:`interventions.engine.sweep.sweep_runs`.
        steps: as in :func:`vlm_jax.generate`.
        chunk: how many variants generate together.
    """
    check_unanswered(inputs)
    variants = sized_variants(variants, model.depths)
    base = acting(base, model.depths)
    check_sites((*base, *variants.take(0).interventions), (), model.sites(inputs), model.depths, inputs.input_ids.shape)
    check_acts(variants)
    options = decoding(model, max_new_tokens, steps)
    # The last token of every prompt must lie behind the prefix.
    padding = int(np.asarray(inputs.attention_mask)[:, ::-1].argmax(1).max())
    length = inputs.input_ids.shape[1]
    start = possible_prefix(model, inputs, min(first_token(variants, length), length - 1 - padding))
    chunk = chunk_of(inputs, start) if chunk is None else chunk
    tokens = _program(model, inputs, base, variants, start=start, chunk=chunk, options=options)
    check_finite(tokens)
    return tokens


@functools.partial(jax.jit, static_argnames=("start", "chunk", "options"))
def _program(
    model: Model, inputs: Inputs, base, variants: Variants, *, start: int, chunk: int, options: Decoding
) -> jax.Array:
    features, _ = model.features(inputs)
    entire = embedded(model, inputs, base, features)
    past = _prefix_cache(model, inputs, base, entire, start) if start else ()
    base_entry = behind_prefix(entire, start)
    variant_entry = entered(model, inputs, base, variants, base_entry, features, start)
    window = model.window(inputs, start)

    def one_variant(number):
        entry = base_entry
        if variant_entry is not None:
            entry = entry._replace(x=variant_entry.x[number])
            if variant_entry.deepstack is not None:
                entry = entry._replace(deepstack=variant_entry.deepstack[number])
        interventions = (*base, *variants.take(number).interventions)
        return continued(model, inputs, entry, window, past, interventions, options)

    return jax.lax.map(one_variant, jnp.arange(len(variants)), batch_size=chunk)


def _prefix_cache(model: Model, inputs: Inputs, base, entire, start: int) -> tuple:
    """The keys and values of the base run's first ``start`` tokens, ``(L, B, start, G, head_dim)`` twice, as the one
    segment of the past."""
    window = model.text.window(inputs.tokens.first(start), inputs.position_ids[:, :, :start])
    deepstack = None if entire.deepstack is None else entire.deepstack[:, :, :start]
    _, keys_and_values, _ = model.text.scan(entire.x[:, :start], window, deepstack=deepstack, interventions=base)
    return (keys_and_values,)
