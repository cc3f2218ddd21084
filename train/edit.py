"""Training of P4's representation editors: the parameters, batch, loss and labels for :func:`train.loop.fit`."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from interventions.kinds.loreft import LoReFT
from train.objective import prompt_loss
from train.subsets import FREEZE
from vlm_jax import Model
from vlm_jax.inputs import Inputs
from vlm_jax.prompts import Fitted
from vlm_jax.typing import ArrayLike

#: Editor -> the label of its trained arrays, which is P4's symbol for them.
EDITOR_LABELS = {"visual": "psi_V", "cross": "psi_c", "prefix": "psi_P", "suffix": "psi_S"}


@flax.struct.dataclass
class Edited:
    """A frozen model, and the editors that are trained, by name
    (:func:`interventions.editing.editors.init_editors`)."""

    model: Model
    editors: dict[str, LoReFT]


def editor_label(path: str) -> str:
    """The rule for :class:`Edited`: the editors' arrays are trained, the model and the slots are frozen."""
    root, _, rest = path.partition(".")
    if root != "editors":
        return FREEZE
    name, field, *_ = rest.split(".")
    return EDITOR_LABELS[name] if field == "weights" else FREEZE


@flax.struct.dataclass
class EditorBatch:
    """Prompts with their answers.

    inputs: :meth:`vlm_jax.inputs.Inputs.turned`. where: the tokens on which the editors "prefix" and "suffix" act.
    index, valid: positions of the gold tokens, and which of them are not padding.
    """

    inputs: Inputs
    where: dict[str, Bool[ArrayLike, "batch tokens"]]
    index: Int[ArrayLike, "batch answer"]
    valid: Bool[ArrayLike, "batch answer"]


def editor_loss(params: Edited, batch: EditorBatch, key: jax.Array) -> Float[Array, ""]:
    """P4's next-token loss: the mean cross-entropy, in nats, of the gold tokens and the token that ends their turn, in
    the model with the editors. ``key`` is not used."""
    inputs = batch.inputs
    image = jnp.zeros(inputs.input_ids.shape, bool) if inputs.is_image is None else inputs.is_image
    where = {"visual": None, "cross": image, **batch.where}
    editors = tuple(editor.replace(where=where[name]) for name, editor in params.editors.items())
    return prompt_loss(params.model, Fitted(inputs, batch.index, batch.valid), editors)
