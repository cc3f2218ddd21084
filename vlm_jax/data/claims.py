"""Claims that are true of one picture and false of its twin, and what one claim in text says about another."""

import dataclasses
from typing import NamedTuple

import numpy as np

from vlm_jax.data.arrangements import CONVERSE, SPATIAL, random_arrangement, random_twins
from vlm_jax.data.scenes import Arrangement, pick
from vlm_jax.data.world import COLOUR_RGB, SHAPES

DENIES = {
    "left of": ("right of", "inside"),
    "right of": ("left of", "inside"),
    "above": ("below", "beside", "inside"),
    "below": ("above", "beside", "inside"),
    "beside": ("above", "below", "inside"),
    "inside": tuple(CONVERSE),
}
"""Relation of a thing to another -> the relations to it that are then false. The others are open."""
NUMBERS = {2: "two", 3: "three", 4: "four"}


class Claim(NamedTuple):
    """What a statement says, as in "The star" "is" "left of the cross"."""

    subject: str
    verb: str
    predicate: str

    @property
    def clause(self) -> str:
        return " ".join(self)

    @property
    def statement(self) -> str:
        return f"{self.clause[0].upper()}{self.clause[1:]}."

    @property
    def question(self) -> str:
        return f"{self.verb.capitalize()} {self.subject} {self.predicate}?"


class Stated(NamedTuple):
    """A claim about a picture. Whether it is true can be seen only there."""

    claim: Claim
    scene: Arrangement
    true: bool
    subtask: str


class TwinClaim(NamedTuple):
    """A claim with a picture of which it is true and one of which it is false."""

    claim: Claim
    subtask: str
    """The relation, or "colour", "shape" or "count"."""
    pictures: tuple[Arrangement, Arrangement]

    def about(self, true: bool) -> Stated:
        return Stated(self.claim, self.pictures[0 if true else 1], true, self.subtask)


def random_relation(rng: np.random.Generator) -> TwinClaim:
    """A claim that a relation holds between two things."""
    relation = pick(rng, SPATIAL)
    twins = random_twins(rng, relation, int(rng.integers(2, 5)))
    things = twins.pictures[0].things
    a, b = (f"{things[i].colour} {things[i].shape}" for i in (twins.a, twins.b))
    return TwinClaim(_relation(a, relation, b), relation, twins.pictures)


def random_property(rng: np.random.Generator) -> TwinClaim:
    """A claim about a colour, a shape or the number of things, without any relation."""
    kind = pick(rng, ("colour", "shape", "count"))
    picture = random_arrangement(rng, 4 if kind == "count" else None)
    things = list(picture.things)
    if kind == "count":
        count, other = rng.permutation(list(NUMBERS))[:2].tolist()
        kept = [picture.things[:n] for n in (count, other)]
        claim = Claim("there", "are", f"{NUMBERS[count]} objects")
        return TwinClaim(claim, kind, (Arrangement(kept[0]), Arrangement(kept[1])))
    i, j = rng.permutation(len(things))[:2].tolist()
    if kind == "colour":  # the twin's things exchange their colours, so that the colour alone tells nothing
        claim = Claim(f"the {things[i].shape}", "is", things[i].colour)
        colours = things[i].colour, things[j].colour
        things[j], things[i] = (dataclasses.replace(things[k], colour=c) for k, c in zip((j, i), colours, strict=True))
    else:
        claim = Claim("there", "is", f"a {things[i].shape}")
        new = pick(rng, [shape for shape in SHAPES if shape not in {thing.shape for thing in things}])
        things[i] = dataclasses.replace(things[i], shape=new)
    return TwinClaim(claim, kind, (picture, Arrangement(tuple(things))))


def random_deduction(rng: np.random.Generator) -> tuple[str, Claim, bool]:
    """One to three statements, a claim about what they mention, and whether it follows from them or contradicts
    them."""
    shapes, colours = rng.permutation(SHAPES).tolist(), rng.permutation(list(COLOUR_RGB)).tolist()
    a, b, c, d = (f"{colour} {shape}" for colour, shape in zip(colours[:4], shapes[:4], strict=True))
    relation, true = pick(rng, SPATIAL), bool(rng.integers(2))
    given = relation if true else pick(rng, [r for r in SPATIAL if relation in DENIES[r]])
    if relation in ("left of", "right of", "above", "below") and rng.random() < 0.3:
        given = relation if true else CONVERSE[relation]
        premises = [_said(rng, a, given, c), _said(rng, c, given, b)]  # the two together say it of a and b
    else:
        premises = [_said(rng, a, given, b)]
    if rng.random() < 0.5:
        one, other = pick(rng, ((c, d), (a, d), (d, b)))
        premises.append(_said(rng, one, pick(rng, SPATIAL), other))
    text = " ".join(premises[i].statement for i in rng.permutation(len(premises)))
    return text, _relation(a, relation, b), true


def _relation(a: str, relation: str, b: str) -> Claim:
    return Claim(f"the {a}", "is", f"{relation} the {b}")


def _said(rng: np.random.Generator, a: str, relation: str, b: str) -> Claim:
    """The relation of ``a`` to ``b``, or of ``b`` to ``a`` in the words for that."""
    if relation in CONVERSE and rng.random() < 0.5:
        return _relation(b, CONVERSE[relation], a)
    return _relation(a, relation, b)
