"""Arrangements of shapes, and what is left of, above, inside or beside what.

:func:`random_twins` makes two pictures at once: a relation between two things holds in the one and not in the other,
and nothing else differs.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from vlm_jax.data.scenes import SIZE, Arrangement, Thing, pick
from vlm_jax.data.world import COLOUR_RGB, SHAPES

CONVERSE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "beside": "beside",
}
"""Relation of a thing to another -> relation of the other to it; being inside has no name the other way round."""
SPATIAL = (*CONVERSE, "inside")
"""All relations."""
CONTAINERS = ("circle", "square", "diamond", "ring")
"""Shapes in which there is room for a small thing."""

Place = tuple[float, float]
_SMALL, _BIG = (5.5, 6.5), (12.0, 13.5)  # radii in pixels
_WITHIN = 1.5  # how far in pixels the centre of a thing inside another may be from the other's centre


def holds(relation: str, a: Thing, b: Thing) -> bool | None:
    """Whether ``a`` is in this relation to ``b``; None if it is too close to call, which no statement asks about.

    ``a`` is left of ``b`` if its centre is at least 8 pixels further left, and is not if that is 3 pixels at most. It
    is beside ``b`` if their centres are at one height (to 4 pixels) and their edges at most 8 pixels apart, and is not
    if the heights differ by 8 pixels or the edges by 14. A thing inside another is in no other relation to it.
    """
    dx, dy = b.x - a.x, b.y - a.y
    nested = math.hypot(dx, dy) < max(a.radius, b.radius)
    if relation == "inside" or nested:
        return relation == "inside" and nested and a.radius < b.radius
    if relation == "beside":
        gap = abs(dx) - a.radius - b.radius
        near, far = abs(dy) <= 4 and gap <= 8, abs(dy) >= 8 or gap >= 14
        return near if near or far else None
    ahead = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return ahead >= 8 if ahead >= 8 or ahead <= 3 else None


def direction(a: Thing, b: Thing) -> str:
    """Where ``a`` is from ``b``, in one word: "inside" it, or in the direction in which they are further apart."""
    if holds("inside", a, b):
        return "inside"
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


class Twins(NamedTuple):
    """Two arrangements of the same things. ``relation`` holds between the things ``a`` and ``b`` (indices) only in the
    first."""

    relation: str
    a: int
    b: int
    pictures: tuple[Arrangement, Arrangement]


def random_twins(rng: np.random.Generator, relation: str, count: int) -> Twins:
    """Twins with ``count`` things.

    One thing alone tells as little as geometry allows. Its shape, colour and size never tell anything. Its place tells
    nothing about "inside" and "beside": over all twins, every thing is equally often at a place in either picture. It
    must tell something about the four directions, because what is left of another thing is, on average, further left
    than what is right of one; there the twins have two things change places that are near each other.
    """
    while True:
        a, b, *others = _looks(rng, relation, count)
        places = _PLACERS.get(relation, _change_places)(rng, relation, a, b)
        if places is None:
            continue
        pairs = [(_at(a, first), _at(b, second)) for first, second in places]
        placed = _place_others(rng, others, [thing for pair in pairs for thing in pair])
        if placed is None:
            continue
        things = (a, b, *placed)
        order = sorted(range(count), key=lambda i: -things[i].radius)
        pictures = [Arrangement(tuple((*pair, *placed)[i] for i in order)) for pair in pairs]
        return Twins(relation, order.index(0), order.index(1), (pictures[0], pictures[1]))


def random_arrangement(rng: np.random.Generator, count: int | None = None) -> Arrangement:
    """An arrangement of ``count`` things, by default two to four, as in the first or second picture of twins."""
    count = int(rng.integers(2, 5)) if count is None else count
    return random_twins(rng, pick(rng, SPATIAL), count).pictures[rng.integers(2)]


def _looks(rng: np.random.Generator, relation: str, count: int) -> list[Thing]:
    """Things of different shapes and colours. Of the first two at most one is big."""
    shapes = rng.permutation(SHAPES).tolist()[:count]
    if relation == "inside":
        shapes[1] = str(rng.choice([shape for shape in CONTAINERS if shape not in (shapes[0], *shapes[2:])]))
        big = [False, True]
    else:
        big = [False, bool(rng.random() < 0.4)]
        if rng.random() < 0.5:
            big.reverse()
    big += (rng.random(count - 2) < 0.4).tolist()
    colours = rng.permutation(list(COLOUR_RGB)).tolist()
    return [
        Thing(shape, colour, rng.uniform(*(_BIG if large else _SMALL)))
        for shape, colour, large in zip(shapes, colours, big, strict=False)
    ]


def _at(thing: Thing, place: Place) -> Thing:
    return dataclasses.replace(thing, x=place[0], y=place[1])


def _anywhere(rng: np.random.Generator, radius: float) -> Place:
    """A place where a thing of this radius is whole in the picture."""
    x, y = rng.uniform(radius + 1, SIZE - 1 - radius, 2).tolist()
    return x, y


def _fits(thing: Thing) -> bool:
    return all(thing.radius + 1 <= c <= SIZE - 1 - thing.radius for c in (thing.x, thing.y))


def _apart(a: Thing, b: Thing) -> bool:
    return math.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + 1


def _change_places(rng: np.random.Generator, relation: str, a: Thing, b: Thing) -> list[tuple[Place, Place]] | None:
    """Places of ``a`` and ``b`` in both pictures, for a direction: they change places."""
    along, across = rng.uniform(8, 14), rng.uniform(-16, 16)
    along = along if relation in ("left of", "above") else -along
    dx, dy = (along, across) if relation in ("left of", "right of") else (across, along)
    first = _anywhere(rng, max(a.radius, b.radius))
    second = first[0] + dx, first[1] + dy
    big = max(a, b, key=lambda thing: thing.radius)
    if not _fits(_at(big, second)) or not _apart(_at(a, first), _at(b, second)):
        return None
    return [(first, second), (second, first)]


def _step_inside(rng: np.random.Generator, relation: str, a: Thing, b: Thing) -> list[tuple[Place, Place]] | None:
    """``a`` is inside ``b``, or at another place that was drawn in the same way."""
    here, there = (_anywhere(rng, b.radius) for _ in range(2))
    off = rng.uniform(-_WITHIN, _WITHIN, 2) / math.sqrt(2)
    inside, outside = ((place[0] + off[0], place[1] + off[1]) for place in (here, there))
    return [(inside, here), (outside, here)] if _apart(_at(a, outside), _at(b, here)) else None


def _step_beside(rng: np.random.Generator, relation: str, a: Thing, b: Thing) -> list[tuple[Place, Place]] | None:
    """``b`` is beside ``a``, or where it would be beside another ``a`` whose place was drawn in the same way."""
    pairs = []
    side = 1 if rng.random() < 0.5 else -1
    for _ in range(2):
        first = _anywhere(rng, a.radius)
        reach = side * (a.radius + b.radius + rng.uniform(1, 6))
        pairs.append((first, (first[0] + reach, first[1] + rng.uniform(-3, 3))))
    if not all(_fits(_at(b, second)) for _, second in pairs):
        return None
    crossed = [(pairs[i][0], pairs[1 - i][1]) for i in range(2)]
    for first, second in crossed:
        one, other = _at(a, first), _at(b, second)
        if not _apart(one, other) or holds("beside", one, other) is not False:
            return None
    return [pairs[0], crossed[0]]


_PLACERS = {"inside": _step_inside, "beside": _step_beside}


def _place_others(rng: np.random.Generator, others: list[Thing], taken: list[Thing]) -> list[Thing] | None:
    """The other things at places that are free in both pictures. A small one often comes inside a big one before it."""
    placed: list[Thing] = []
    for thing in others:
        hosts = [t for t in placed if t.size == "big" and t.shape in CONTAINERS]
        if hosts and thing.size == "small" and rng.random() < 0.6:
            placed.append(_at(thing, (hosts[0].x, hosts[0].y)))
            continue
        for _ in range(30):
            candidate = _at(thing, _anywhere(rng, thing.radius))
            if all(_apart(candidate, other) for other in (*taken, *placed)):
                placed.append(candidate)
                break
        else:
            return None
    return placed
