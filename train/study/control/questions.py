"""The yes-or-no questions about a picture's object: a fixed one, and rewordings that the editors never see."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vlm_jax.data import Example

#: The paper's question. ``{a}`` is the object with its article.
FIXED = "Is the object {a} in the image?"
#: Questions with the same meaning. The editors are never trained on them; the model that they edit is.
REWORDINGS = (
    "Is the object in the image {a}?",
    "In the image, is the object {a}?",
    "Does the image show {a}?",
    "Does the picture show {a}?",
    "Is there {a} in the image?",
    "Is there {a} in the picture?",
    "Can you see {a} in the image?",
    "Do you see {a}?",
    "Is this {a}?",
    "Is it {a}?",
    "Is the thing in the picture {a}?",
    "Is the shown object {a}?",
    "Would you call the object {a}?",
    "Is {a} shown here?",
    "Is {a} in the image?",
    "The object in the image is {a}. Is this true?",
    "This is {a}. True?",
    "The picture shows {a}. Yes or no?",
    "Tell me if the object is {a}.",
    "Yes or no: is the object {a}?",
)


def with_article(name: str) -> str:
    """ "a circle", "an 8"."""
    return f"{'an' if name[0] in 'aeiou8' else 'a'} {name}"


def ask(example: Example, name: str, shown: str, wording: str = FIXED) -> Example:
    """A question whether an example's picture shows ``name``; it shows ``shown``.

    The question and what it is about are added to the example's id, because the same picture is asked several.
    """
    text = wording.format(a=with_article(name))
    return dataclasses.replace(
        example,
        id=f"{example.id}/{name}/{text}",
        question=text,
        answers=("yes" if name == shown else "no",),
        choices=None,
        subtask=name,
    )


def turned(example: Example) -> Example:
    """The same question with the other answer."""
    return dataclasses.replace(example, answers=("no" if example.answers[0] == "yes" else "yes",))


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """The same questions, with their answers dealt out at random."""
    order = np.random.default_rng(seed).permutation(len(examples))
    return [
        dataclasses.replace(example, answers=examples[other].answers)
        for example, other in zip(examples, order, strict=True)
    ]


def balanced(
    pictures: Sequence[tuple[Example, str]], name: str, count: int, rng: np.random.Generator
) -> list[tuple[Example, str]]:
    """``count`` pictures, half of which show ``name``; fewer if there are not enough. Each comes with what it shows."""
    mine = [pair for pair in pictures if pair[1] == name]
    others = [pair for pair in pictures if pair[1] != name]
    half = min(count // 2, len(mine), len(others))
    chosen = [pool[i] for pool in (mine, others) for i in rng.permutation(len(pool))[:half]]
    return [chosen[i] for i in rng.permutation(len(chosen))]
