"""Groups of tokens: the parts of a prompt that interventions act on, and between which attention is measured or
knocked out.

A group is named by a name in :data:`GROUPS` or :data:`UNIONS`, by some of its tokens (``first4:question`` or
``last6:prompt``), or by several of these joined by "+".
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Int32

from vlm_jax.acting import checked
from vlm_jax.errors import UserError, nearest
from vlm_jax.prompts import Batch
from vlm_jax.sites import Intervention

#: The groups; a token's label is an index into them. "before" and "after" are template text before and after the first
#: image; "last" is the last token before the answer, which writes the answer's first token; "register" are the
#: registers behind images, the end-of-image token included. It is the newest group and therefore the last one, so that
#: arrays of older runs keep their meaning.
GROUPS = ("padding", "before", "image", "image_end", "after", "question", "last", "answer", "register")
#: Names for several groups. "text" is P1's T, the text behind the image; "instruction" is its part before the last
#: token of the prompt, which P4 edits; "writers" are the tokens that write the answer; "prompt" is everything that is
#: not generated.
UNIONS = {
    "instruction": ("after", "question"),
    "text": ("after", "question", "last", "answer"),
    "writers": ("last", "answer"),
    "prompt": ("before", "image", "image_end", "register", "after", "question", "last"),
    "all": GROUPS[1:],
}
#: The six roles of ROME (Meng et al. 2022).
ROLES = ("first_subject", "middle_subject", "last_subject", "next", "further", "last")


_END = re.compile(r"(first|last)(\d+):(.+)")


def members(group: str) -> list[int]:
    """The labels of a whole group, or of several joined by "+", such as "image+image_end".

    Raises:
        UserError: for an unknown name, or for a group that is a part of another, such as "first4:question".
    """
    labels = set()
    for name in group.split("+"):
        if is_part(name):
            raise UserError(f"{name!r} is a part of a group, but a whole group is needed here: name one")
        if name not in GROUPS and name not in UNIONS:
            raise UserError(f"unknown token group {name!r}{nearest(name, (*GROUPS, *UNIONS))}")
        labels |= {GROUPS.index(part) for part in UNIONS.get(name, (name,))}
    return sorted(labels)


def is_part(name: str) -> bool:
    """Whether a name stands for some tokens of a group, as "first4:question" does."""
    return _END.fullmatch(name) is not None


def check_group(group: str) -> None:
    """Raises a UserError if ``group`` names no tokens."""
    tokens_of(group, np.zeros((1, 0), np.int32))


def check_positions(group: str) -> None:
    """Raises a UserError if ``group`` is no group, role or ``subject``, or several of these joined by "+"."""
    for part in group.split("+"):
        if is_part(part) or part not in (*ROLES, "subject"):
            try:
                check_group(part)
            except UserError:
                if is_part(part):
                    raise
                known = ("subject", *ROLES, *GROUPS, *UNIONS)
                raise UserError(f"unknown token group {part!r}{nearest(part, known)}") from None


def positions_of(group: str, batch: Batch) -> Bool[np.ndarray, "batch tokens"]:
    """The tokens of a group, of one of ROME's roles, or of the ``subject`` in an encoded batch; or of several of these
    joined by "+"."""
    labels = label(batch)
    named = roles(batch) | {"subject": batch.spans["subject"]}
    parts = [named[part] if part in named else tokens_of(part, labels) for part in group.split("+")]
    return np.logical_or.reduce(parts)


def tokens_of(group: str, labels: Int[np.ndarray, "batch tokens"]) -> Bool[np.ndarray, "batch tokens"]:
    """The tokens of a group in a batch with these labels.

    ``first4:question`` are the first four tokens of the question in each row. If a row has fewer than eight of them, it
    is half of them, rounded down, so that the first and the last four never overlap (P4's released code).
    """
    chosen = np.zeros(np.shape(labels), bool)
    for part in group.split("+"):
        if end := _END.fullmatch(part):
            whole = np.isin(labels, members(end[3]))
            count = whole.sum(1, keepdims=True)
            if int(end[2]) < 1:
                raise UserError(f"the token group {part!r} has no tokens: give at least 1")
            place = np.cumsum(whole, 1) if end[1] == "first" else count + 1 - np.cumsum(whole, 1)
            size = np.where(count < 2 * int(end[2]), count // 2, int(end[2]))
            chosen |= whole & (place <= size)
        else:
            chosen |= np.isin(labels, members(part))
    return chosen


def label(batch: Batch) -> Int32[np.ndarray, "batch tokens"]:
    """The group of every token of an encoded batch, as an index into :data:`GROUPS`."""
    mask, spans = np.asarray(batch.inputs.attention_mask), batch.spans
    # In a row without an image, "after" begins at the question.
    marks = np.where(spans["image"].any(1, keepdims=True), spans["image"], spans["question"])
    labels = np.where(np.maximum.accumulate(marks, 1), GROUPS.index("after"), GROUPS.index("before"))
    for name in ("image", "image_end", "question", "answer"):
        labels[spans[name]] = GROUPS.index(name)
    if batch.inputs.register_index is not None:
        labels[np.asarray(batch.inputs.register_index) >= 0] = GROUPS.index("register")
    labels[spans["end"]] = GROUPS.index("answer")
    labels[np.arange(len(labels)), _answer_begins(batch) - 1] = GROUPS.index("last")
    return np.where(mask, labels, GROUPS.index("padding")).astype(np.int32)


def _answer_begins(batch: Batch) -> Int[np.ndarray, "batch"]:
    """The index of the answer's first token; in a row without an answer, the index after its last token."""
    answer, mask = batch.spans["answer"], np.asarray(batch.inputs.attention_mask)
    return np.where(answer.any(1), answer.argmax(1), mask.shape[1] - mask[:, ::-1].argmax(1))


def bind(interventions: Intervention | Sequence[Intervention], batch: Batch) -> tuple[Intervention, ...]:
    """The interventions, one or several, with their token groups looked up in a batch.

    Raises:
        UserError: if the batch has no token of a group.
    """
    labels = label(batch)
    return tuple(intervention.bound(labels) for intervention in checked(interventions))


def roles(batch: Batch) -> dict[str, Bool[np.ndarray, "batch tokens"]]:
    """The tokens of ROME's roles: the subject's first, middle and last tokens, the token after it (``next``), the
    tokens from there to the last one (``further``), and the last token before the answer. The subject is the question's
    part that the example names, or else the question.

    As in ROME's code, a token can have two roles: the one token of a short subject is its first and its last, and the
    token after a subject can be the prompt's last. A row lacks a role that no token of it has.
    """
    subject, stop = batch.spans["subject"], _answer_begins(batch)[:, None]
    index = np.arange(subject.shape[1])
    begin = subject.argmax(1)[:, None]
    end = subject.shape[1] - 1 - subject[:, ::-1].argmax(1)[:, None]
    return {
        "first_subject": subject & (index == begin),
        "middle_subject": subject & (index > begin) & (index < end),
        "last_subject": subject & (index == end),
        "next": (index == end + 1) & (index < stop),
        "further": (index > end + 1) & (index < stop - 1),
        "last": index == stop - 1,
    }
