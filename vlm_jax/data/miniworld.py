"""Miniworld: six small visual-question tasks, generated in memory and modelled on six public benchmarks.

In a *knowledge* task the picture shows only an entity's emblem, and the answer is a fact about that entity. In a
*perception* task the answer can be read only in the picture. Every example is a pure function of its task, split and
index.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data import wordings
from vlm_jax.data.draw import draw_scene
from vlm_jax.data.example import Example
from vlm_jax.data.scenes import (
    Chart,
    Emblem,
    Form,
    Scene,
    Signs,
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
    """The relation of a fact, or how a part of the picture is named ("by place" or "by key")."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: how to generate a scene and a question about it."""

    name: str
    family: str
    analogue: str
    """The public benchmark that it imitates."""
    scene: Callable[[np.random.Generator], Scene]
    ask: Callable[[np.random.Generator, Any, bool], Question]
    """Random generator, scene, whether the wording is held out -> question."""


def pick(rng: np.random.Generator, options):
    """One of ``options`` at random. Unlike NumPy's ``choice`` it does not turn them into an array."""
    return options[rng.integers(len(options))]


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


TASKS = {
    task.name: task
    for task in (
        Task("mini-okvqa", "knowledge", "OK-VQA", random_emblem, _ask_open),
        Task("mini-aokvqa", "knowledge", "A-OKVQA", random_emblem, _ask_choices),
        Task("mini-scienceqa", "knowledge", "ScienceQA", random_emblem, _ask_hinted),
        Task("mini-docvqa", "perception", "DocVQA", random_form, _ask_field),
        Task("mini-infovqa", "perception", "InfographicVQA", random_chart, _ask_bar),
        Task("mini-textvqa", "perception", "TextVQA", random_signs, _ask_sign),
    )
}


def _generator(task: str, split: str, index: int) -> np.random.Generator:
    """The random generator of one example; no two examples share one."""
    return np.random.default_rng([WORLD_SEED, list(TASKS).index(task), list(SPLIT_SIZES).index(split), index])


def make_scene(task: str, split: str, index: int) -> Scene:
    """The scene that :func:`make_example` draws."""
    return TASKS[task].scene(_generator(task, split, index))


def make_example(task: str, split: str, index: int) -> Example:
    """One example of a task. Its picture does not depend on :data:`HELD_OUT_SHARE`."""
    rng = _generator(task, split, index)
    scene = TASKS[task].scene(rng)
    image = draw_scene(scene, rng)
    held_out = rng.random() < HELD_OUT_SHARE[task]
    question = TASKS[task].ask(rng, scene, held_out)
    return Example(
        id=f"{task}/{split}/{index:06d}",
        images=(image,),
        question=question.text,
        answers=(question.answer,),
        choices=question.choices,
        family=TASKS[task].family,
        task=task,
        subtask=question.subtask,
    )
