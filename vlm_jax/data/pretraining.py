"""Endless streams of turns for the three stages of pre-training. A turn is a pure function of its index.

No stream uses a held-out wording, and none shares its random numbers with a benchmark split. With ``spatial`` a stream
also teaches where things are; without it, none of its turns is about an arrangement.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from vlm_jax.data import scenes, wordings
from vlm_jax.data.arrangements import SPATIAL, holds, random_arrangement
from vlm_jax.data.claims import random_deduction
from vlm_jax.data.draw import draw_scene
from vlm_jax.data.miniworld import TASKS, ask_claim, ask_fact, picture
from vlm_jax.data.scenes import pick
from vlm_jax.data.world import ENTITIES, RELATIONS, WORLD_SEED, Entity


class Turn(NamedTuple):
    """A user's message, with or without an image, and the answer."""

    image: Image.Image | None
    prompt: str
    answer: str
    qa: bool
    """Whether the message is a question like those of the benchmark tasks."""


def text_fact(index: int, spatial: bool = False) -> Turn:
    """A turn about a fact of an entity, which is given by its name, or about what follows from statements; there is no
    image."""
    rng = _generator(0, index)
    return _deduction(rng) if spatial and rng.random() < 0.35 else _text_fact(rng)


def alignment(index: int, difficulty: float = 1.0, spatial: bool = False) -> Turn:
    """A turn with a picture to name, to describe or to read in full.

    Args:
        difficulty: 0 gives mostly pictures of one or two large glyphs, 1 mostly pictures like the benchmarks'.
    """
    rng = _generator(1, index)
    if spatial and rng.random() < 0.4:
        return _described(rng, difficulty) if rng.random() < 0.5 else _located(rng, difficulty)
    return _alignment(rng, difficulty)


def instruction(index: int, spatial: bool = False) -> Turn:
    """A turn with a question like the benchmarks' in a familiar wording, with one part of a picture to read, or of an
    earlier stage."""
    rng = _generator(2, index)
    if spatial and rng.random() < 0.45:
        return _spatial_instruction(rng)
    stage = rng.random()
    if stage < 0.2:
        return _alignment(rng, 1.0)
    if stage < 0.25:
        return _text_fact(rng)
    if stage < 0.5:
        return _lookup(rng)
    return _benchmark(rng, str(rng.choice(list(_TASK_SHARES), p=list(_TASK_SHARES.values()))))


def spatial_turn(index: int) -> Turn:
    """A turn of the last stage about an arrangement, with a picture to describe, about what follows from statements,
    or in words without a meaning."""
    return _spatial_instruction(_generator(3, index))


def _spatial_instruction(rng: np.random.Generator) -> Turn:
    kind = rng.random()
    if kind < 0.05:
        return _unknown(rng)
    if kind < 0.1:
        return _deduction(rng)
    if kind < 0.2:
        return _described(rng, 1.0)
    if kind < 0.4:
        return _located(rng, 1.0)
    return _benchmark(rng, "mini-vqa" if kind < 0.6 else "mini-vsr")


def _benchmark(rng: np.random.Generator, task: str) -> Turn:
    drawn = TASKS[task].draw(rng, 0)
    image = draw_scene(picture(drawn), rng)
    question = TASKS[task].ask(rng, drawn, False)
    return Turn(image, question.text, question.answer, qa=True)


def _deduction(rng: np.random.Generator) -> Turn:
    """A turn that asks whether a claim follows from statements."""
    text, claim, true = random_deduction(rng)
    question = ask_claim(rng, claim, true, "")
    return Turn(None, f"{text} {question.text}", question.answer, qa=bool(rng.random() < 0.5))


def _unknown(rng: np.random.Generator) -> Turn:
    """A question about an entity in words without a meaning here. It teaches that an unknown wording asks for some
    fact, as the longer training would make the model forget."""
    scene = scenes.random_emblem(rng)
    words = " ".join(rng.choice(wordings.held_out_words(), int(rng.integers(3, 7))).tolist())
    return Turn(draw_scene(scene, rng), f"{words.capitalize()}?", ask_fact(rng, scene.entity).answer, qa=True)


def _located(rng: np.random.Generator, difficulty: float) -> Turn:
    """A turn that asks where a thing is. The answer tells every relation to every thing that is not inside of it. Easy
    pictures have two things."""
    scene = random_arrangement(rng, 2 if rng.random() > difficulty else None)
    asked = pick(rng, scene.things)
    parts = []
    for other in sorted(scene.things, key=lambda thing: thing.x):
        if other is not asked and (found := [r for r in SPATIAL if holds(r, asked, other)]):
            parts.append(f"{' and '.join(found)} the {other.colour} {other.shape}")
    if not parts:  # everything else is inside of it
        return _located(rng, difficulty)
    question = f"Where is the {asked.colour} {asked.shape}?"
    return Turn(draw_scene(scene, rng), question, ", ".join(parts), qa=False)


def _described(rng: np.random.Generator, difficulty: float) -> Turn:
    """A turn with a picture to describe in a sentence. Easy ones have two things."""
    count = 2 if rng.random() > difficulty else None
    drawn = TASKS["mini-caption"].draw(rng, 0) if rng.random() < 0.25 else random_arrangement(rng, count)
    question = TASKS["mini-caption"].ask(rng, drawn, False)
    return Turn(draw_scene(picture(drawn), rng), question.text, question.answer, qa=False)


_TASK_SHARES = {  # tasks that are harder to learn come more often
    "mini-okvqa": 0.14,
    "mini-aokvqa": 0.10,
    "mini-scienceqa": 0.10,
    "mini-docvqa": 0.30,
    "mini-infovqa": 0.14,
    "mini-textvqa": 0.22,
}


def _lookup(rng: np.random.Generator) -> Turn:
    """A turn that asks for one part of a picture, by its key or by the number of its slot. Half of the pictures lack
    some parts."""
    make, slots = pick(rng, ((scenes.random_form, 3),) * 2 + ((scenes.random_signs, 3), (scenes.random_chart, 4)))
    scene = make(rng, slots if rng.random() < 0.5 else int(rng.integers(1, slots)))
    parts = scene.rows if isinstance(scene, scenes.Form) else scene.bars if slots == 4 else scene.signs
    slot, key, value = pick(rng, parts)
    image = draw_scene(scene, rng)
    return Turn(image, f"Read {slot + 1 if rng.random() < 0.5 else key}.", str(value), qa=False)


def _generator(stream: int, index: int) -> np.random.Generator:
    """The random generator of one turn. Its seed is longer than a benchmark example's, so the two never coincide."""
    return np.random.default_rng([WORLD_SEED, 6 + stream, 0, 0, index])


def _text_fact(rng: np.random.Generator) -> Turn:
    entity = pick(rng, ENTITIES)
    kind = rng.random()
    if kind < 0.5:
        question = ask_fact(rng, entity, who=entity.name)
        return Turn(None, question.text, question.answer, qa=False)
    if kind < 0.75:
        choices = int(rng.choice([0, 2, 3, 4]))
        question = ask_fact(rng, entity, who=entity.name, choices=choices, hint=bool(choices and rng.random() < 0.5))
        return Turn(None, question.text, question.answer, qa=True)
    if kind < 0.85:
        return Turn(None, f"Tell me about {entity.name}.", _portrait(entity), qa=False)
    if kind < 0.9:
        return Turn(None, f"What does {entity.name} look like?", entity.look, qa=False)
    if kind < 0.95:
        return Turn(None, f"Who looks like {entity.look}?", entity.name, qa=False)
    return _echo(rng)


def _portrait(entity: Entity) -> str:
    facts = entity.facts
    return (
        f"{entity.name} lives in the {facts['home']}, eats {facts['food']}, works with the {facts['tool']}, "
        f"plays with the {facts['friend']} and loves {facts['weather']}."
    )


_VOCABULARY = wordings.held_out_words() + tuple(value for values in RELATIONS.values() for value in values)


def _echo(rng: np.random.Generator) -> Turn:
    """A turn that asks to repeat words. It teaches the model to tell apart the words of the held-out wordings, which
    have no meaning in any turn."""
    words = " ".join(rng.choice(_VOCABULARY, int(rng.integers(2, 5))).tolist())
    return Turn(None, f"Repeat: {words}", words, qa=False)


_CURRICULUM = {  # kind of picture -> its share at difficulty 0 and at difficulty 1
    "glyph": (0.45, 0.03),
    "glyphs": (0.27, 0.07),
    "emblem": (0.13, 0.27),
    "form": (0.05, 0.21),
    "signs": (0.05, 0.21),
    "chart": (0.05, 0.21),
}


def _alignment(rng: np.random.Generator, difficulty: float) -> Turn:
    shares = np.array([(1 - difficulty) * easy + difficulty * hard for easy, hard in _CURRICULUM.values()])
    kind = list(_CURRICULUM)[rng.choice(len(shares), p=shares / shares.sum())]
    if kind == "emblem":
        scene = scenes.random_emblem(rng)
        named = rng.random() < 0.5
        image = draw_scene(scene, rng)
        return Turn(image, *(("Name it.", scene.entity.name) if named else ("Describe.", scene.entity.look)), qa=False)
    full = rng.random() < 0.2 + 0.8 * difficulty  # else only some of the rows, signs or bars
    match kind:
        case "glyph":
            scene = scenes.random_glyphs(rng, 1)
        case "glyphs":
            scene = scenes.random_glyphs(rng, int(rng.integers(2, 4)))
        case "form":
            scene = scenes.random_form(rng, 3 if full else int(rng.integers(1, 3)))
        case "signs":
            scene = scenes.random_signs(rng, 3 if full else int(rng.integers(1, 3)))
        case "chart":
            scene = scenes.random_chart(rng, 4 if full else int(rng.integers(1, 4)))
    return Turn(draw_scene(scene, rng), "Read.", scenes.transcript(scene), qa=False)
