"""Groups of tokens: who an intervention acts on, and between whom attention is measured or knocked out."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.errors import UserError, nearest
from vlm_jax.prompts import Batch

#: Labels of tokens. "before" comes before the first image, "after" behind it: template text that is no other group;
#: "last" is the last token before the answer, which writes its first one.
GROUPS = ("padding", "before", "image", "image_end", "after", "question", "last", "answer")
#: Names for several of them. "text" is P1's T, the text behind the image; "writers" are the tokens that write the
#: answer; "prompt" is all that is not generated.
UNIONS = {
    "text": ("after", "question", "last", "answer"),
    "writers": ("last", "answer"),
    "prompt": ("before", "image", "image_end", "after", "question", "last"),
    "all": GROUPS[1:],
}
#: The six roles of ROME (Meng et al. 2022), with the question as the subject.
ROLES = ("first question", "middle question", "last question", "next", "further", "last")


def members(group: str) -> list[int]:
    """The labels of a group, or of several joined by "+", such as "image+image_end"."""
    found = []
    for name in group.split("+"):
        if name not in GROUPS and name not in UNIONS:
            raise UserError(f"unknown token group {name!r}{nearest(name, (*GROUPS, *UNIONS))}")
        found += [GROUPS.index(part) for part in UNIONS.get(name, (name,))]
    return sorted(set(found))


def label(batch: Batch) -> np.ndarray:
    """The group of every token of an encoded batch, ``(B, T)`` int32, as an index into :data:`GROUPS`."""
    mask, spans = np.asarray(batch.inputs.attention_mask), batch.spans
    # Where a row has no image, what follows the question is "after".
    marks = np.where(spans["image"].any(1, keepdims=True), spans["image"], spans["question"])
    labels = np.where(np.maximum.accumulate(marks, 1), GROUPS.index("after"), GROUPS.index("before"))
    for name, span in (("image", "image"), ("image_end", "image_end"), ("question", "question"), ("answer", "answer")):
        labels[spans[span]] = GROUPS.index(name)
    labels[spans["end"]] = GROUPS.index("answer")
    labels[np.arange(len(labels)), _answer_begins(batch) - 1] = GROUPS.index("last")
    return np.where(mask, labels, GROUPS.index("padding")).astype(np.int32)


def _answer_begins(batch: Batch) -> np.ndarray:
    """Where the answer begins ``(B,)``; where there is none, the end of the row."""
    answer, mask = batch.spans["answer"], np.asarray(batch.inputs.attention_mask)
    return np.where(answer.any(1), answer.argmax(1), mask.shape[1] - mask[:, ::-1].argmax(1))


def bind(interventions: Sequence[Any], batch: Batch) -> tuple:
    """The interventions with their token groups looked up in a batch; those that name none are returned as they are.

    Raises:
        UserError: for a group of which the batch has no token.
    """
    labels = label(batch)
    return tuple(i.bound(labels) if hasattr(i, "bound") else i for i in interventions)


def roles(batch: Batch) -> dict[str, np.ndarray]:
    """ROME's roles, ``(B, T)`` bool each: the question's first, middle and last tokens, the token after it, the
    further ones, and the last before the answer."""
    question, stop = batch.spans["question"], _answer_begins(batch)[:, None]
    place = np.arange(question.shape[1])
    first = question & (place == question.argmax(1)[:, None])
    end = question.shape[1] - 1 - question[:, ::-1].argmax(1)[:, None]
    last_question = place == end
    return {
        "first question": first,
        "middle question": question & ~first & ~last_question,
        "last question": last_question & ~first,
        "next": (place == end + 1) & (place < stop - 1),
        "further": (place > end + 1) & (place < stop - 1),
        "last": place == stop - 1,
    }
