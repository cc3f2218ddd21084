"""The description of a dataset: its location on the hub, the meaning of its columns, and its splits.

The hub's splits are those of the dataset's repository. Our splits (trace, train, eval, test) are made from their rows.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

from vlm_jax.errors import UserError, nearest

AnswerForm = Literal["texts", "text", "option", "index", "letter", "shown_letter", "class", "yes_no", "conversation"]
"""The form in which a dataset's rows give the answer.

texts: several acceptable texts: a list of texts or of ``{"answer": text}``, or one text.
text: one text.
option, letter, index: the text, the letter or the number (from 0) of the right choice, or a list of several
(:data:`vlm_jax.data.stated.Form`). If a row has no choices, its question is open, and the column holds texts.
shown_letter: the letter of the right choice, if the text of the question already lists the choices.
class: a class number of a ``ClassLabel`` (of the datasets library). The names of the classes are the choices.
yes_no: the word yes or no, or 0 for no and 1 for yes.
conversation: a list of turns ``{"from": .., "value": ..}``. The first turn from "human" is the question, and the first
from "gpt" is the answer.
"""


class Split(NamedTuple):
    """Where one of our splits comes from: ``size`` examples from the hub's split ``hub``."""

    hub: str
    size: int


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DatasetSpec:
    """Everything that the library must know about a dataset."""

    name: str
    """The name that users give, such as "docvqa"."""
    title: str
    """The name in the docs, such as "DocVQA"."""
    hub_ids: tuple[str, ...]
    """The hub repositories that hold the dataset, in the order in which they are tried."""
    rows: Mapping[str, int]
    """The hub's split -> its number of rows."""
    columns: Mapping[str, str | tuple[str, ...]]
    """Role -> the column or columns that have this role. The roles:

    id, question, hint, image, choices, subtask: what the name says.
    image_id: equal for rows with the same image. By default it is a digest of the image's bytes.
    answers: several acceptable texts.
    gold: the right answer in any form of ``answers`` other than texts and conversation.
    group: equal for rows that are scored together.
    """
    answers: AnswerForm
    metric: str
    """The metric of the dataset's benchmark: a name in :data:`eval.judging.METRICS`."""
    splits: Mapping[str, Split]
    """Our split -> where its examples come from."""
    written: tuple[str, ...] = ()
    """Columns whose lists are written as strings."""
    config: str | None = None
    """The name of the dataset's config in the hub repository, if the repository has several configs."""
    family: str | None = None
    """P0's family of the dataset: knowledge or perception."""
    lmms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """lmms-eval's task name -> the hub's split that it scores."""
    hidden: tuple[str, ...] = ()
    """The hub's splits without public answers."""
    skip_unanswered: bool = False
    """Whether rows without an answer are left out. If not, such a row raises an error."""
    ask: str = "{question}"
    """A template for the text of the question. ``{question}`` stands for the text in the question's column."""
    only: tuple[str, str] | None = None
    """A column and a value, as text. Only rows with this value in this column are used."""
    head: int | None = None
    """Our splits are made from this number of rows at the start of a hub's split; None for all rows. With a limit, a
    streamed run reads fewer files."""
    data_files: Mapping[str, str] | None = None
    """The hub's split -> its file, if the repository does not say which files belong to which split."""
    field: str | None = None
    """If the data are a JSON file: the key under which the rows are."""
    image_folder: str | None = None
    """If the image column holds file names: the folder of these files in a local copy of the repository. Without it, a
    text in that column is read as a base64 image."""
    licence: str = "see its page"
    gotchas: str = ""
    """What may surprise a user, for the table in docs/data.md."""

    def used(self, *roles: str) -> tuple[str, ...]:
        """The names of the columns that have these roles, each name once. Without roles: of all columns in use. A role
        that the dataset lacks has no columns."""
        by_role = [self.columns[role] for role in roles or self.columns if role in self.columns]
        return tuple(dict.fromkeys(c for names in by_role for c in ([names] if isinstance(names, str) else names)))


#: The name of a split that has all rows of the hub's split that the benchmark scores, in the hub's order.
ALL = "all"
#: Our split -> how many examples P0 uses. The evaluation set of P0 is our split test. Our split eval is for choosing
#: among methods.
P0_SIZES = {"trace": 1000, "train": 3000, "eval": 1000, "test": 1000}


def split_of(spec: DatasetSpec, split: str) -> Split:
    """Where one of our splits comes from: the hub's split and the number of examples.

    Raises:
        UserError: if the dataset does not have that split.
    """
    if split not in spec.splits:
        if split in P0_SIZES:
            possible = ", ".join(f"{name} {size:,}" for name, (_, size) in spec.splits.items())
            raise UserError(f"{spec.name} has too few labelled rows for a split {split!r}: use {possible}, or {ALL}")
        raise UserError(f"unknown split {split!r} of {spec.name}{nearest(split, [*spec.splits, ALL])}")
    return spec.splits[split]
