"""Causal tracing of one batch (P0, section 2.2, equations 1-6), as a function of arrays."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PRNGKeyArray

from interventions.engine.grids import patch_grid
from interventions.engine.read import Gold
from interventions.engine.sweep import sweep_runs
from interventions.kinds.add import Add
from interventions.modules import MODULE_SITES
from interventions.trace.corruption import embed
from vlm_jax import Inputs, Model
from vlm_jax.errors import UserError
from vlm_jax.showing import shown
from vlm_jax.typing import Array, ArrayLike


@shown
class Trace(NamedTuple):
    """The probability of each sample's gold answer in the clean and the corrupted run, the total effect ``te`` of the
    corruption; and for each module, attention and MLP, the indirect effect ``ie`` and the restoration rate ``rr``."""

    p_clean: Float[Array, "batch"]
    p_corrupt: Float[Array, "batch"]
    te: Float[Array, "batch"]
    ie: Float[Array, "batch layers 2"]
    rr: Float[Array, "batch layers 2"]

    def _notes_html(self) -> str:
        """The mean restoration rate of every module, as a heat map."""
        from interventions.figures.base import picture_html  # Matplotlib takes a second to import
        from interventions.figures.tracing import heatmap

        title = f"mean of {len(self.rr)} samples"
        return picture_html(heatmap({title: np.asarray(self.rr).mean(0)}), f"restoration rate (RR), {title}")


def causal_trace(
    model: Model,
    inputs: Inputs,
    question_mask: Bool[ArrayLike, "batch tokens"],
    answer_mask: Bool[ArrayLike, "batch tokens"],
    *,
    noise: Float[ArrayLike, "batch tokens width"] | None = None,
    noise_scale: float = 2.0,
    key: PRNGKeyArray | None = None,
    engine: Literal["sweep", "naive"] = "sweep",
    eps: float = 1e-8,
) -> Trace:
    """Restoration rate of every layer's attention and MLP output (P0, equations 1-6).

    The corrupted run has noise on the embeddings of the question tokens. For each cell, one module's clean output is
    patched at all positions into the corrupted run.

    Args:
        question_mask: the tokens that get noise.
        answer_mask: the gold tokens in ``inputs``.
        noise: added at the question tokens. None draws it with ``key`` from
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
        added = noise_scale * sigma * jax.random.normal(key, embedded.x.shape)
    else:
        added = noise
    added = jnp.where(question[..., None], added, 0)
    variants, shape = patch_grid(MODULE_SITES, model.config.text.num_hidden_layers)
    runs = sweep_runs(model, inputs, variants, gold, base=(Add(added),), clean=(), engine=engine)
    p_clean, p_corrupt = runs.clean.probability, runs.base.probability
    p_patch = runs.variants.probability.reshape(*shape, -1).transpose(2, 1, 0)
    te = p_clean - p_corrupt
    ie = p_patch - p_corrupt[:, None, None]
    return Trace(p_clean, p_corrupt, te, ie, ie / (te[:, None, None] + eps))


@jax.jit
def embedding_std(x: Float[ArrayLike, "batch tokens width"], mask: Bool[ArrayLike, "batch tokens"]) -> Float[Array, ""]:
    """sigma_E: the standard deviation over all elements of ``x`` at real tokens."""
    return jnp.std(x.astype(jnp.float32), where=jnp.broadcast_to(mask[..., None], x.shape))
