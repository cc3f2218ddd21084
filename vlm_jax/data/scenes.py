"""Scenes: the contents of a picture before it is drawn, and so the ground truth for questions about it."""

import dataclasses
import string
from typing import Any

import numpy as np

from vlm_jax.data.world import COLOUR_RGB, ENTITIES, Entity

SIZE = 64
"""Height and width of every picture, in pixels."""
FIELD_LABELS = ("AGE", "FEE", "QTY", "TAX", "DAY", "ROW", "BOX", "LOT")
TALLEST = 8


@dataclasses.dataclass(frozen=True)
class Emblem:
    """One entity's emblem."""

    entity: Entity


@dataclasses.dataclass(frozen=True)
class Form:
    """Rows of ``(slot, label, value)``, from the top down; a slot is one of three places."""

    rows: tuple[tuple[int, str, str], ...]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Bars of ``(slot, colour, height)``, from left to right; a slot is one of four places."""

    bars: tuple[tuple[int, str, int], ...]


@dataclasses.dataclass(frozen=True)
class Signs:
    """Signs of ``(slot, colour, word)``, from the top down; a slot is one of three places."""

    signs: tuple[tuple[int, str, str], ...]


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """One to three large letters or digits."""

    text: str


@dataclasses.dataclass(frozen=True)
class Thing:
    """A coloured shape at a place. Its centre ``x, y`` is counted in pixels from the upper left corner, and ``radius``
    is the distance in pixels from the centre that nothing of it exceeds."""

    shape: str
    colour: str
    radius: float
    x: float = SIZE / 2
    y: float = SIZE / 2

    @property
    def size(self) -> str:
        return "big" if self.radius > 9 else "small"

    @property
    def look(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Two to four things, no two of one shape or of one colour. They are painted in their order, so a thing inside
    another comes after it."""

    things: tuple[Thing, ...]


Scene = Emblem | Form | Chart | Signs | Glyphs | Arrangement


def transcript(scene: Scene) -> str:
    """All text and values of a scene, in reading order."""
    match scene:
        case Emblem(entity):
            return entity.look
        case Glyphs(text):
            return text
        case Form(parts) | Chart(parts) | Signs(parts):
            return " ".join(f"{key} {value}" for _, key, value in parts)
        case Arrangement(things):
            return " ".join(f"{thing.colour} {thing.shape}" for thing in things)


def pick(rng: np.random.Generator, options: Any) -> Any:
    """One of ``options`` at random. Unlike NumPy's ``choice`` it does not turn them into an array."""
    return options[rng.integers(len(options))]


def random_emblem(rng: np.random.Generator) -> Emblem:
    return Emblem(ENTITIES[rng.integers(len(ENTITIES))])


def random_form(rng: np.random.Generator, count: int = 3) -> Form:
    """A form with ``count`` of its three rows filled in."""
    labels = _some(rng, FIELD_LABELS, count)
    values = (str(v) for v in rng.choice(np.arange(10, 100), count, replace=False))
    return Form(tuple(zip(_slots(rng, 3, count), labels, values, strict=True)))


def random_chart(rng: np.random.Generator, count: int = 4) -> Chart:
    """A chart with ``count`` of its four bars drawn."""
    heights = rng.integers(1, TALLEST + 1, count).tolist()
    return Chart(tuple(zip(_slots(rng, 4, count), _some(rng, COLOUR_RGB, count), heights, strict=True)))


def random_signs(rng: np.random.Generator, count: int = 3) -> Signs:
    """``count`` of three signs. Each has its own colour and its own consonant-vowel-consonant word."""
    words: list[str] = []
    while len(words) < count:
        first, middle, last = (rng.choice(list(s)) for s in ("BDFKLMNPRSTZ", "AEIOU", "BDFLMNPRSTZ"))
        if first != last and (word := first + middle + last) not in words:
            words.append(str(word))
    return Signs(tuple(zip(_slots(rng, 3, count), _some(rng, COLOUR_RGB, count), words, strict=True)))


def random_glyphs(rng: np.random.Generator, count: int = 1) -> Glyphs:
    """``count`` letters, or ``count`` digits."""
    alphabet = string.digits if rng.random() < 0.3 else string.ascii_uppercase
    return Glyphs("".join(rng.choice(list(alphabet), count)))


def _slots(rng: np.random.Generator, slots: int, count: int) -> list[int]:
    return sorted(rng.choice(slots, count, replace=False).tolist())


def _some(rng: np.random.Generator, options, count: int) -> list[str]:
    return rng.choice(list(options), count, replace=False).tolist()
