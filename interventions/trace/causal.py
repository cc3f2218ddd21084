"""Causal tracing of one batch (P0, section 2.2, equations 1-6), as a function of arrays."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from interventions.engine.grids import patch_grid
from interventions.engine.read import Gold
from interventions.engine.sweep import sweep_runs
from interventions.kinds.add import Add
from interventions.modules import MODULE_SITES
from interventions.trace.corruption import embed
from vlm_jax import Inputs, Model
from vlm_jax.errors import UserError


class Trace(NamedTuple):
    """Results for each sample: ``p_clean, p_corrupt, te (B,)`` and ``ie, rr (B, L, 2)``; the last axis is attention,
    MLP."""

    p_clean: Any
    p_corrupt: Any
    te: Any
    ie: Any
    rr: Any


def causal_trace(
    model: Model,
    inputs: Inputs,
    question_mask,
    answer_mask,
    *,
    noise=None,
    noise_scale: float = 2.0,
    key: jax.Array | None = None,
    engine: Literal["sweep", "naive"] = "sweep",
    eps: float = 1e-8,
) -> Trace:
    """Restoration rate of every layer's attention and MLP output (P0, equations 1-6).

    The corrupted run has noise on the embeddings of the question tokens. For each cell, one module's clean output is
    patched at all positions into the corrupted run.

    Args:
        question_mask: ``(B, T)`` bool: the tokens that get noise.
        answer_mask: ``(B, T)`` bool: the gold tokens in ``inputs``.
        noise: ``(B, T, D)``, added at the question tokens. None draws it with ``key`` from
            N(0, (noise_scale * sigma_E)^2), where sigma_E is the standard deviation of the embeddings of real tokens.
        engine: "sweep" computes shared tokens and layers once; "naive" runs the whole model for every cell and is the
            reference in tests.
        eps: the constant of equation 4.

    Raises:
        UserError: if a row has no question token or no gold token.
    """
    question, answer = np.asarray(question_mask, bool), np.asarray(answer_mask, bool)
    if not question.any(1).all():
        raise UserError(f"row {int(np.argmin(question.any(1)))} has no question token: mark at least one in its mask")
    gold = Gold.of(inputs, answer)
    if noise is None:
        embedded = embed(model, inputs)
        sigma = embedding_std(embedded.x, inputs.attention_mask)
        key = jax.random.key(0) if key is None else key
        noise = noise_scale * sigma * jax.random.normal(key, embedded.x.shape)
    noise = jnp.where(question[..., None], noise, 0)
    variants, shape = patch_grid(MODULE_SITES, model.config.text.num_hidden_layers)
    runs = sweep_runs(model, inputs, variants, gold, base=(Add(noise),), clean=(), engine=engine)
    p_clean, p_corrupt = runs.clean.probability, runs.base.probability
    p_patch = runs.variants.probability.reshape(*shape, -1).transpose(2, 1, 0)
    te = p_clean - p_corrupt
    ie = p_patch - p_corrupt[:, None, None]
    return Trace(p_clean, p_corrupt, te, ie, ie / (te[:, None, None] + eps))


@jax.jit
def embedding_std(x: jax.Array, mask: jax.Array) -> jax.Array:
    """sigma_E: the standard deviation over all elements of ``x (B, T, D)`` at real tokens."""
    return jnp.std(x.astype(jnp.float32), where=jnp.broadcast_to(mask[..., None], x.shape))
