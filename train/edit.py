"""Training of P4's editors: the loss of a step, for :func:`train.loop.fit`."""

import flax.struct
import jax
import jax.numpy as jnp

from interventions.kinds.loreft import LoReFT
from train.trunk import answer_loss
from vlm_jax import Model
from vlm_jax.inputs import Inputs


@flax.struct.dataclass
class Frozen:
    """What training reads and never changes: the model, and in which blocks and layers the editors are: editor ->
    site -> slots."""

    model: Model
    slot: dict[str, dict[str, jax.Array]]


@flax.struct.dataclass
class Batch:
    """Prompts with their answers (:meth:`vlm_jax.inputs.Inputs.turned`); the tokens ``(B, T)`` that the editors
    "prefix" and "suffix" act on; where the gold tokens are, and which of these places count ``(B, A)``."""

    inputs: Inputs
    where: dict[str, jax.Array]
    index: jax.Array
    valid: jax.Array


def loss(weights: dict[str, dict], frozen: Frozen, batch: Batch, key: jax.Array) -> jax.Array:
    """Mean cross-entropy of the gold tokens and the end of their turn under the editors with these weights (editor ->
    site -> arrays): P4's next-token loss. In the backward pass layers and blocks are run again."""
    model, inputs = frozen.model, batch.inputs.turned()
    image = jnp.zeros(inputs.input_ids.shape, bool) if inputs.is_image is None else inputs.is_image
    where = {"visual": None, "cross": image, **batch.where}
    editors = tuple(LoReFT(weights=own, slot=frozen.slot[name], where=where[name]) for name, own in weights.items())
    x, _ = model.hidden(inputs, editors, remat=True)
    target = jnp.take_along_axis(inputs.input_ids, batch.index, 1)
    return answer_loss(model, x, batch.index, batch.valid, target)
