"""What a feature's direction does to answers: it is removed from the text at every layer (P2), or more of it is added
where the feature is (steering)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from interventions.diff.place import Place
from interventions.engine.cost import Announced, estimate
from interventions.engine.read import Odds
from interventions.engine.sweep import sweep_runs
from interventions.engine.variants import stack
from interventions.kinds.add import Add
from interventions.kinds.groups import bind
from interventions.kinds.layers import slots
from interventions.kinds.project_out import ProjectOut
from vlm_jax import Model
from vlm_jax.config import Config
from vlm_jax.data import Example
from vlm_jax.errors import UserError
from vlm_jax.processor import Processor
from vlm_jax.prompts import batches, encode
from vlm_jax.runs.processes import fetch, progress
from vlm_jax.sites import Intervention

#: P2's three sites, in the order of a layer.
SITES = ("text.attn_out", "text.mlp_out", "text.resid_post")
#: The spellings whose first tokens count as each answer.
_YES, _NO = (" Yes", "Yes", " yes", "yes", "YES"), (" No", "No", " no", "no", "NO")
_LENGTH_STEP = 32


class Answered(NamedTuple):
    """Answers to yes-or-no questions, with nothing changed and with each direction removed (or added)."""

    odds: Float[np.ndarray, " samples"]
    """Log-odds of yes against no of the unchanged model."""
    without: Float[np.ndarray, "directions samples"]
    """The same without each direction, or with more of it."""
    truth: Bool[np.ndarray, " samples"]
    """Whether yes is right."""

    def take(self, directions: Sequence[int]) -> "Answered":
        """The answers without these directions."""
        return self._replace(without=self.without[list(directions)])

    @property
    def margin(self) -> Float[np.ndarray, " samples"]:
        """Log-odds of the right answer."""
        return np.where(self.truth, self.odds, -self.odds)

    @property
    def margin_without(self) -> Float[np.ndarray, "directions samples"]:
        """The same without each direction."""
        return np.where(self.truth, self.without, -self.without)

    @property
    def correct(self) -> Bool[np.ndarray, " samples"]:
        """Whether the unchanged model is right."""
        return (self.odds > 0) == self.truth

    @property
    def correct_without(self) -> Bool[np.ndarray, "directions samples"]:
        """Whether it is right without each direction."""
        return (self.without > 0) == self.truth


def answer_tokens(processor: Processor, config: Config) -> tuple[Int[np.ndarray, " yes"], Int[np.ndarray, " no"]]:
    """The first tokens of yes and of no as the model's answers, and those of other spellings that stand for one of the
    two only.

    Raises:
        UserError: if the answers yes and no begin with the same token.
    """
    own = []
    for word in ("yes", "no"):
        batch = encode([Example(word, (), "Is it?", (word,))], processor, config)
        own.append(int(np.asarray(batch.inputs.input_ids)[0, batch.spans["answer"][0].argmax()]))
    if own[0] == own[1]:
        raise UserError("the answers yes and no begin with the same token of this model: use another one")
    yes, no = (
        {processor.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in texts} for texts in (_YES, _NO)
    )
    both = yes & no
    yes, no = ((yes - both) | {own[0]}) - {own[1]}, ((no - both) | {own[1]}) - {own[0]}
    return np.array(sorted(yes), np.int32), np.array(sorted(no), np.int32)


def without_directions(
    depth: int, directions: Float[np.ndarray, "directions width"], tokens: str = "text"
) -> list[ProjectOut]:
    """For each direction the intervention that removes it, at P2's three sites of every layer, from a token group."""
    slot = {site: np.zeros(depth, np.int32) for site in SITES}
    return [ProjectOut.of(vector[None, None], slot, group=tokens) for vector in directions]


def with_directions(
    depth: int,
    places: Sequence[Place],
    directions: Float[np.ndarray, "directions width"],
    amount: float,
    tokens: str = "text",
) -> list[Add]:
    """For each direction the intervention that adds ``amount`` unit lengths of it at its own place. The places must be
    of one site to be compared in one sweep."""
    lengths = np.linalg.norm(directions, axis=-1, keepdims=True)
    added = []
    for place, vector in zip(places, amount * directions / lengths, strict=True):
        if place.layer is None:
            added.append(Add(vector, place.site, group=tokens))
        else:
            added.append(Add(vector[None], place.site, slots(depth, [place.layer]), group=tokens))
    return added


def answer_under(
    model: Model,
    processor: Processor,
    examples: Sequence[Example],
    changes: Sequence[ProjectOut] | Sequence[Add],
    *,
    base: Sequence[Intervention] = (),
    batch: int = 16,
    label: str = "",
) -> Answered:
    """Answers yes-or-no questions with nothing changed and under each of some interventions: one sweep for each batch.

    Args:
        base: interventions that act in every run.

    Raises:
        UserError: for an example whose answer is neither yes nor no.
    """
    truth = truths(examples)
    yes, no = answer_tokens(processor, model.config)
    groups = list(batches(examples, processor, model.config, batch, step=_LENGTH_STEP, with_answer=False))
    sweeps, acting = [], [bind(base, encoded) for _, encoded in groups]
    for _, encoded in groups:
        sweeps.append((encoded.inputs, stack(bind(changes, encoded)), Odds.of(encoded.inputs, yes, no)))
    costs = [estimate(model, *sweep) for sweep in sweeps]
    odds = np.zeros(len(examples))
    without = np.zeros((len(changes), len(examples)))
    bar = progress(total=len(examples), desc=f"ablate {label}".strip(), unit="sample", leave=False)
    with Announced(sum(costs[1:], costs[0])), bar:
        for (rows, _), sweep, always in zip(groups, sweeps, acting, strict=True):
            runs = fetch(sweep_runs(model, *sweep, base=always))
            odds[rows], without[:, rows] = runs.base[: len(rows)], runs.variants[:, : len(rows)]
            bar.update(len(rows))
    return Answered(odds, without, truth)


def truths(examples: Sequence[Example]) -> Bool[np.ndarray, " samples"]:
    """Whether yes is the answer to each question.

    Raises:
        UserError: for an example whose answer is neither yes nor no.
    """
    answers = [example.answers[0].strip().lower() for example in examples]
    for example, answer in zip(examples, answers, strict=True):
        if answer not in ("yes", "no"):
            raise UserError(f"example {example.id!r} is answered {answer!r}: ablations need questions with yes or no")
    return np.array(answers) == "yes"
