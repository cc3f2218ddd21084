"""The miniworld's inhabitants: 48 entities, each with an emblem, a name and facts."""

import dataclasses
from collections.abc import Mapping

import numpy as np

WORLD_SEED = 20260
"""The seed of the whole miniworld, facts and pixels."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "crescent")
COLOUR_RGB = {
    "red": (214, 34, 38),
    "green": (36, 150, 56),
    "blue": (38, 84, 222),
    "yellow": (240, 208, 30),
    "purple": (140, 44, 180),
    "orange": (246, 128, 16),
}

# fmt: off
RELATIONS: Mapping[str, tuple[str, ...]] = {
    "home": ("harbor", "forest", "cave", "desert", "meadow", "tower",
             "island", "swamp", "glacier", "canyon", "garden", "village"),
    "food": ("figs", "bread", "moss", "honey", "beans", "plums",
             "seeds", "cheese", "nuts", "rice", "berries", "kelp"),
    "tool": ("hammer", "needle", "lantern", "shovel", "ladder", "rope",
             "compass", "brush", "anvil", "basket", "mirror", "whistle"),
    "friend": ("badger", "heron", "otter", "raven", "lynx", "mole",
               "toad", "crane", "hare", "newt", "wren", "finch"),
    "weather": ("rain", "snow", "fog", "hail", "thunder", "sunshine",
                "wind", "frost", "drizzle", "mist", "dust", "heat"),
}
# fmt: on
"""Relation -> its values. No value belongs to two relations."""


@dataclasses.dataclass(frozen=True)
class Entity:
    """An inhabitant: its name, its emblem (a shape in a colour), and one value of every relation."""

    name: str
    shape: str
    colour: str
    facts: Mapping[str, str]

    @property
    def look(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


def _names(count: int, rng: np.random.Generator) -> list[str]:
    """Different invented names of four to six letters. The first three letters of each are unique."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    names: dict[str, str] = {}
    while len(names) < count:
        pattern = rng.choice(["cvcv", "cvccv", "cvcvc", "cvccvc"])
        name = "".join(rng.choice(list(consonants if kind == "c" else vowels)) for kind in pattern)
        names.setdefault(name[:3], name)
    return list(names.values())


def _populate() -> tuple[Entity, ...]:
    """The entities. Values are assigned at random, each value of a relation to the same number of entities."""
    rng = np.random.default_rng(WORLD_SEED)
    emblems = [(shape, colour) for shape in SHAPES for colour in COLOUR_RGB]
    names = _names(len(emblems), rng)
    facts = {
        relation: rng.permutation(np.resize(values, len(emblems))).tolist() for relation, values in RELATIONS.items()
    }
    return tuple(
        Entity(name, shape, colour, {relation: column[i] for relation, column in facts.items()})
        for i, (name, (shape, colour)) in enumerate(zip(names, emblems, strict=True))
    )


ENTITIES = _populate()
