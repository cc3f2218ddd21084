"""The lens and the attributions of many examples, at the last token of their prompts, which writes the answer."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from interventions.kinds.groups import GROUPS, bind, label
from interventions.lens.attribution import Attribution, attribute
from interventions.lens.lens import logit_lens
from vlm_jax import Model
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.prompts import Batch, batches
from vlm_jax.runs.processes import fetch, progress
from vlm_jax.sites import Intervention

Against = Literal["likeliest", "nothing"]


class Reading(NamedTuple):
    """What was read of B samples; :data:`interventions.lens.artifacts.LENS` describes the fields."""

    gold: Int[np.ndarray, "samples"]
    foil: Int[np.ndarray, "samples"]
    words: Int[np.ndarray, "samples points k"]
    probability: Float[np.ndarray, "samples points k"]
    p_gold: Float[np.ndarray, "samples points"]
    rank: Int[np.ndarray, "samples points"]
    logit: Float[np.ndarray, "samples"]
    embeddings: Float[np.ndarray, "samples"]
    attn: Float[np.ndarray, "samples layers"]
    heads: Float[np.ndarray, "samples layers heads"]
    attn_rest: Float[np.ndarray, "samples layers"]
    mlp: Float[np.ndarray, "samples layers"]
    deepstack: Float[np.ndarray, "samples layers"]
    edits: Float[np.ndarray, "samples layers"]


def writer_and_gold(batch: Batch) -> tuple[Int[np.ndarray, "batch"], Int[np.ndarray, "batch"]]:
    """The position of each prompt's last token, and the id of the first token of its answer, which that token
    writes.

    Raises:
        UserError: if a row has no answer.
    """
    answer = batch.spans["answer"]
    if not answer.any(1).all():
        raise UserError(f"row {int(np.argmin(answer.any(1)))} has no token of a gold answer to look for: leave it out")
    at = (label(batch) == GROUPS.index("last")).argmax(1)
    return at, np.asarray(batch.inputs.input_ids)[np.arange(len(at)), at + 1]


def read_examples(
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    *,
    size: int = 16,
    top: int = 5,
    against: Against = "likeliest",
    name: str = "",
    interventions: Sequence[Intervention] = (),
) -> Reading:
    """The lens and the attributions of every example.

    Args:
        size: how many examples are run at once.
        top: how many of the likeliest words to keep.
        against: what is subtracted from the logit of the gold word: that of the likeliest other word at the end, or
            nothing.
        name: of the task, for the progress bar.
        interventions: those that act on the model. Those that name token groups are bound to every batch.

    Raises:
        UserError: as :func:`interventions.lens.lens.logit_lens`, or if an example has an empty answer.
    """
    found: dict[int, Any] = {}
    with progress(total=len(examples), desc=f"lens {name}".strip(), unit="sample", leave=False) as bar:
        for rows, batch in batches(examples, processor, model.config, size):
            read = _read_batch(model, batch, top, against, bind(interventions, batch))
            for number, row in enumerate(rows):
                found[row] = jax.tree.map(lambda array, number=number: array[number], read)
            bar.update(len(rows))
    return jax.tree.map(lambda *parts: np.stack(parts), *(found[row] for row in range(len(examples))))


def _read_batch(
    model: Model, batch: Batch, top: int, against: Against, interventions: tuple[Intervention, ...]
) -> Reading:
    at, gold = writer_and_gold(batch)
    k = max(top, 2)  # of which the foil is one
    lens = fetch(logit_lens(model, batch.inputs, at[:, None], gold, k=k, interventions=interventions))
    first, second = lens.words[:, -1, 0, :2].T
    foil = np.where(first == gold, second, first) if against == "likeliest" else None
    parts: Attribution = fetch(attribute(model, batch.inputs, at, gold, foil, interventions=interventions))
    words, probability = lens.words[:, :, 0, :top], lens.probability[:, :, 0, :top]
    subtracted = np.full_like(gold, -1) if foil is None else foil.astype(gold.dtype)
    return Reading(gold, subtracted, words, probability, lens.gold[..., 0], lens.rank[..., 0], **parts._asdict())
