"""The description of a dataset: its location on the hub, the meaning of its columns, and its splits."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

from vlm_jax.errors import UserError, nearest

AnswerForm = Literal["texts", "text", "index", "letter", "shown_letter", "class", "yes_no", "conversation"]
"""The form in which a dataset's rows give the answer.

texts: acceptable texts, as a list, as a list written as a string, or as a list of ``{"answer": text}``.
text: one text.
index, letter: the number or the letter of the right choice. A row without choices is an open question with texts.
shown_letter: a letter, where the question already contains the choices.
class: a ClassLabel, whose names are the choices.
yes_no: the word, or 0 for no and 1 for yes.
conversation: turns of ``{"from": .., "value": ..}``; the first from "human" is the question, from "gpt" the answer.
"""


class Split(NamedTuple):
    """``size`` examples from the hub's split ``hub``."""

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
    """Hub repositories that hold it; they are tried in this order."""
    rows: Mapping[str, int]
    """The hub's split -> its number of rows."""
    columns: Mapping[str, str | tuple[str, ...]]
    """Role -> its column or columns. Roles: id, question, hint, image, image_id (equal for rows with the same image; by
    default a digest of the image's bytes), answers (several acceptable texts), choices, gold (the right answer in
    another form), subtask, group."""
    answers: AnswerForm
    metric: str
    """The metric of its benchmark: a name in :data:`eval.judging.METRICS`."""
    splits: Mapping[str, Split]
    """Our split -> its examples."""
    config: str | None = None
    """The name of its config in the hub repository, where there are several."""
    family: str | None = None
    """P0's family of the dataset: knowledge or perception."""
    lmms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """lmms-eval's task name -> the hub's split that it scores."""
    hidden: tuple[str, ...] = ()
    """The hub's splits whose answers are withheld."""
    skip_unanswered: bool = False
    """Whether rows without an answer are left out. Otherwise they are an error."""
    ask: str = "{question}"
    """The text of the question, in which ``{question}`` is the column's text."""
    only: tuple[str, str] | None = None
    """A column and a value: only rows with this value are used."""
    head: int | None = None
    """How many rows are used, from the first; None for all. A limit lets a streamed run read few files."""
    data_files: Mapping[str, str] | None = None
    """The hub's split -> its file, where the repository does not say."""
    field: str | None = None
    """The key in a JSON file under which the rows are."""
    image_folder: str | None = None
    """The folder in a local copy with the files that the image column names. Without it, texts in that column are
    base64."""
    licence: str = "see its page"
    gotchas: str = ""
    """What a user should know, for the table in docs/data.md."""

    def used(self, *roles: str) -> tuple[str, ...]:
        """The columns of these roles, or of all roles."""
        columns = [self.columns[role] for role in roles or self.columns if role in self.columns]
        return tuple(dict.fromkeys(c for part in columns for c in ([part] if isinstance(part, str) else part)))


#: The split with all rows that the benchmark scores, in their order.
ALL = "all"
#: P0's sizes. Its evaluation set is our test split; eval is for choosing among methods.
P0_SIZES = {"trace": 1000, "train": 3000, "eval": 1000, "test": 1000}


def split_of(spec: DatasetSpec, split: str) -> Split:
    """The hub's split and the size of one of our splits.

    Raises:
        UserError: if the dataset does not have that split.
    """
    if split not in spec.splits:
        if split in P0_SIZES:
            rows = ", ".join(f"{part} {size:,}" for part, (_, size) in spec.splits.items())
            raise UserError(f"{spec.name} has too few labelled rows for a split {split!r}: use {rows}, or {ALL}")
        raise UserError(f"unknown split {split!r} of {spec.name}{nearest(split, [*spec.splits, ALL])}")
    return spec.splits[split]
