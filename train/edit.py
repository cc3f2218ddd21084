"""Training of P4's editors: what :func:`train.loop.fit` needs of them, the loss and the labels."""

import flax.struct
import jax
import jax.numpy as jnp

from interventions.kinds.loreft import LoReFT
from train.objective import prompt_loss
from train.subsets import FREEZE
from vlm_jax import Model
from vlm_jax.inputs import Inputs
from vlm_jax.prompts import Fitted

#: Editor -> the label of its trained arrays, as P4 calls it.
LABELS = {"visual": "psi_V", "cross": "psi_c", "prefix": "psi_P", "suffix": "psi_S"}


@flax.struct.dataclass
class Edited:
    """A model and the editors that are trained, by name (:func:`interventions.editing.editors.init_editors`)."""

    model: Model
    editors: dict[str, LoReFT]


def label(path: str) -> str:
    """The rule of :class:`Edited`: the editors' arrays are trained, the model and the slots are not."""
    root, _, rest = path.partition(".")
    if root != "editors":
        return FREEZE
    name, field, *_ = rest.split(".")
    return LABELS[name] if field == "weights" else FREEZE


@flax.struct.dataclass
class Batch:
    """Prompts with their answers (:meth:`vlm_jax.inputs.Inputs.turned`).

    where: the tokens ``(B, T)`` that the editors "prefix" and "suffix" act on. index, valid: positions ``(B, A)`` of
    the gold tokens, and which of them count.
    """

    inputs: Inputs
    where: dict[str, jax.Array]
    index: jax.Array
    valid: jax.Array


def loss(params: Edited, batch: Batch, key: jax.Array) -> jax.Array:
    """Mean cross-entropy of the gold tokens and the end of their turn under the editors: P4's next-token loss."""
    inputs = batch.inputs
    image = jnp.zeros(inputs.input_ids.shape, bool) if inputs.is_image is None else inputs.is_image
    where = {"visual": None, "cross": image, **batch.where}
    editors = tuple(editor.replace(where=where[name]) for name, editor in params.editors.items())
    return prompt_loss(params.model, Fitted(inputs, batch.index, batch.valid), editors)
