"""Miniworld: nine small visual-question tasks, generated in memory and modelled on public benchmarks.

In a *knowledge* task the picture shows only an entity's emblem, and the answer is a fact about that entity. In a
*perception* task the answer can be read only in the picture. The other three are about an arrangement of shapes, or ask
for a description. Every example is a pure function of its task, split and
index.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data import wordings
from vlm_jax.data.arrangements import random_arrangement
from vlm_jax.data.captions import caption
from vlm_jax.data.claims import Claim, Stated, TwinClaim, random_property, random_relation
from vlm_jax.data.draw import draw_scene
from vlm_jax.data.example import Example
from vlm_jax.data.scenes import (
    Chart,
    Emblem,
    Form,
    Scene,
    Signs,
    pick,
    random_chart,
    random_emblem,
    random_form,
    random_signs,
)
from vlm_jax.data.world import RELATIONS, WORLD_SEED, Entity

HELD_OUT_SHARE = {
    "mini-okvqa": 0.5,
    "mini-aokvqa": 0.5,
    "mini-scienceqa": 0.5,
    "mini-docvqa": 0.5,
    "mini-infovqa": 0.5,
    "mini-textvqa": 0.5,
    "mini-vsr": 0.5,
    "mini-vqa": 0.5,
    "mini-caption": 0.5,
}
"""Task -> the share of its examples whose wording pre-training never uses."""

SPLIT_SIZES = {"trace": 1000, "train": 3000, "eval": 1000, "test": 1000}


class Question(NamedTuple):
    """A question about a scene, and its answer."""

    text: str
    answer: str
    choices: tuple[str, ...] | None = None
    """The choices that are written in the text, if any."""
    subtask: str | None = None
    """The relation of a fact or between two things, how a part of the picture is named ("by place" or "by key"), or the
    kind of property or picture."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: how to generate a scene and a question about it."""

    name: str
    family: str | None
    analogue: str
    """The public benchmark that it imitates."""
    scene: Callable[[np.random.Generator], Any]
    """A scene, or a :class:`TwinClaim` for a task of twins."""
    ask: Callable[[np.random.Generator, Any, bool], Question]
    """Random generator, what :meth:`draw` returned, whether the wording is held out -> question."""
    twins: bool = False
    """Whether examples ``2 k`` and ``2 k + 1`` ask the same about two pictures, and are answered yes and no."""
    metric: str = "exact_match"

    def draw(self, rng: np.random.Generator, member: int) -> Scene | Stated:
        """A scene; of twins the first or the second (``member`` 0 or 1) with the claim about it. One generator draws
        twins that differ in nothing else, and which of them is answered yes is random."""
        drawn = self.scene(rng)
        return drawn.about(bool(rng.integers(2)) != bool(member)) if isinstance(drawn, TwinClaim) else drawn


def picture(drawn: Scene | Stated) -> Scene:
    """The scene of what :meth:`Task.draw` returned."""
    return drawn.scene if isinstance(drawn, Stated) else drawn


def ask_fact(
    rng: np.random.Generator,
    entity: Entity,
    *,
    held_out: bool = False,
    who: str = "this creature",
    choices: int = 0,
    hint: bool = False,
) -> Question:
    """A question about one of an entity's facts.

    Args:
        held_out: whether the wording is one that pre-training never uses.
        who: the words for the entity.
        choices: how many choices the question lists; 0 for none.
        hint: whether a line with a hint comes before the question.
    """
    relation = pick(rng, tuple(RELATIONS))
    answer = entity.facts[relation]
    lines = [_template(rng, wordings.FACTS[relation], held_out).format(who=who)]
    if hint:
        lines.insert(0, "Hint: " + _template(rng, wordings.HINTS[relation], held_out))
    options = None
    if choices:
        others = [value for value in RELATIONS[relation] if value != answer]
        options = [answer, *rng.choice(others, choices - 1, replace=False).tolist()]
        options = tuple(options[i] for i in rng.permutation(choices))
        lines.append(_template(rng, wordings.CHOICES, held_out).format(choices=", ".join(options)))
    return Question("\n".join(lines), answer, options, relation)


def _template(rng: np.random.Generator, wording: wordings.Wording, held_out: bool) -> str:
    return pick(rng, wording.held_out if held_out else wording.familiar)


def _ask_open(rng: np.random.Generator, scene: Emblem, held_out: bool) -> Question:
    return ask_fact(rng, scene.entity, held_out=held_out)


def _ask_choices(rng: np.random.Generator, scene: Emblem, held_out: bool) -> Question:
    return ask_fact(rng, scene.entity, held_out=held_out, choices=4)


def _ask_hinted(rng: np.random.Generator, scene: Emblem, held_out: bool) -> Question:
    return ask_fact(rng, scene.entity, held_out=held_out, choices=int(rng.integers(2, 5)), hint=True)


def _ask_field(rng: np.random.Generator, scene: Form, held_out: bool) -> Question:
    return _ask_part(rng, scene.rows, wordings.FIELD, held_out)


def _ask_bar(rng: np.random.Generator, scene: Chart, held_out: bool) -> Question:
    return _ask_part(rng, scene.bars, wordings.BAR, held_out)


def _ask_sign(rng: np.random.Generator, scene: Signs, held_out: bool) -> Question:
    return _ask_part(rng, scene.signs, wordings.SIGN, held_out)


def _ask_part(rng: np.random.Generator, parts, wording: wordings.Wording, held_out: bool) -> Question:
    """A question about one part of a scene. It names the part by its key or, if held out, by its place."""
    slot, key, value = pick(rng, parts)
    # Each task uses only one held-out wording, so that a few hundred examples are enough to learn it.
    template = wording.held_out[0] if held_out else pick(rng, wording.familiar)
    text = wordings.fill_slot(template, slot) if held_out else template.format(key=key)
    return Question(text, str(value), subtask="by place" if held_out else "by key")


def ask_claim(rng: np.random.Generator, claim: Claim, true: bool, subtask: str, held_out: bool = False) -> Question:
    """The question whether a claim is true."""
    words = {"statement": claim.statement, "question": claim.question, "clause": claim.clause}
    text = _template(rng, wordings.CLAIM, held_out).format(**words)
    return Question(text, "yes" if true else "no", subtask=subtask)


def _ask_stated(rng: np.random.Generator, stated: Stated, held_out: bool) -> Question:
    return ask_claim(rng, stated.claim, stated.true, stated.subtask, held_out)


def random_picture(rng: np.random.Generator) -> Scene:
    """A picture of any kind that the tasks show."""
    kinds = (random_emblem, random_form, random_chart, random_signs, random_arrangement, random_arrangement)
    return pick(rng, kinds)(rng)


def _ask_description(rng: np.random.Generator, scene: Scene, held_out: bool) -> Question:
    text = _template(rng, wordings.DESCRIBE, held_out)
    return Question(text, caption(scene), subtask=type(scene).__name__.lower())


TASKS = {
    task.name: task
    for task in (
        Task("mini-okvqa", "knowledge", "OK-VQA", random_emblem, _ask_open),
        Task("mini-aokvqa", "knowledge", "A-OKVQA", random_emblem, _ask_choices),
        Task("mini-scienceqa", "knowledge", "ScienceQA", random_emblem, _ask_hinted),
        Task("mini-docvqa", "perception", "DocVQA", random_form, _ask_field),
        Task("mini-infovqa", "perception", "InfographicVQA", random_chart, _ask_bar),
        Task("mini-textvqa", "perception", "TextVQA", random_signs, _ask_sign),
        Task("mini-vsr", None, "VSR", random_relation, _ask_stated, twins=True, metric="yes_no"),
        Task("mini-vqa", None, "VQAv2", random_property, _ask_stated, twins=True, metric="yes_no"),
        Task("mini-caption", None, "cc_sbu_align", random_picture, _ask_description),
    )
}


def _draw(task: str, split: str, index: int) -> tuple[np.random.Generator, Scene | Stated]:
    """The random generator of an example and what it drew first. No two examples share a generator, except twins."""
    first, member = divmod(index, 2) if TASKS[task].twins else (index, 0)
    rng = np.random.default_rng([WORLD_SEED, list(TASKS).index(task), list(SPLIT_SIZES).index(split), first])
    return rng, TASKS[task].draw(rng, member)


def make_scene(task: str, split: str, index: int) -> Scene:
    """The scene that :func:`make_example` draws."""
    return picture(_draw(task, split, index)[1])


def make_example(task: str, split: str, index: int) -> Example:
    """One example of a task. Its picture does not depend on :data:`HELD_OUT_SHARE`."""
    return _make(task, split, index)[0]


def has_held_out_wording(example: Example) -> bool:
    """Whether a miniworld example's question has a wording that pre-training never uses."""
    task, split, index = example.id.split("/")
    return _make(task, split, int(index))[1]


def _make(task: str, split: str, index: int) -> tuple[Example, bool]:
    """An example, and whether its wording is held out."""
    rng, drawn = _draw(task, split, index)
    # Twins with a different number of things need different numbers of random values, so they are drawn apart.
    image = draw_scene(picture(drawn), rng.spawn(1)[0] if TASKS[task].twins else rng)
    held_out = rng.random() < HELD_OUT_SHARE[task]
    question = TASKS[task].ask(rng, drawn, held_out)
    example = Example(
        id=f"{task}/{split}/{index:06d}",
        images=(image,),
        question=question.text,
        answers=(question.answer,),
        choices=question.choices,
        family=TASKS[task].family,
        task=task,
        metric=TASKS[task].metric,
        subtask=question.subtask,
    )
    return example, held_out
