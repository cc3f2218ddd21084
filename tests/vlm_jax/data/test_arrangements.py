"""Relations between shapes, and twins: what one thing alone tells about the answer."""

import collections
import itertools

import numpy as np
import pytest

from vlm_jax.data.arrangements import CONTAINERS, CONVERSE, SPATIAL, direction, holds, random_twins
from vlm_jax.data.draw import draw_scene
from vlm_jax.data.scenes import SIZE, Arrangement, Thing

DIRECTIONS = ("left of", "right of", "above", "below")


def thing(x, y, radius=6.0, shape="star"):
    return Thing(shape, "red", radius, x, y)


def test_there_are_six_relations():
    assert sorted(SPATIAL) == ["above", "below", "beside", "inside", "left of", "right of"]


@pytest.mark.parametrize(
    "a, b, true, false",
    [
        (thing(10, 30), thing(50, 30), {"left of"}, {"right of", "above", "below", "beside", "inside"}),
        (thing(10, 30), thing(25, 30), {"left of", "beside"}, {"right of", "above", "below", "inside"}),
        (thing(30, 50), thing(30, 10), {"below"}, {"left of", "right of", "above", "beside", "inside"}),
        (thing(10, 10), thing(30, 40), {"left of", "above"}, {"right of", "below", "beside", "inside"}),
        (thing(30, 30), thing(31, 30, 13.0), {"inside"}, {"left of", "right of", "above", "below", "beside"}),
        (thing(30, 30, 13.0), thing(31, 30), set(), set(SPATIAL)),
        (thing(10, 30), thing(50, 35), {"left of"}, {"right of", "below", "beside", "inside"}),  # above: too close
    ],
)
def test_relations_of_two_things(a, b, true, false):
    found = {relation: holds(relation, a, b) for relation in SPATIAL}
    assert {relation for relation, value in found.items() if value is True} == true
    assert {relation for relation, value in found.items() if value is False} == false


def test_a_relation_and_its_converse_say_the_same():
    rng = np.random.default_rng(0)
    for _ in range(500):
        a, b = (thing(*rng.uniform(8, 56, 2), float(rng.choice([6, 13]))) for _ in range(2))
        for relation, converse in CONVERSE.items():
            assert holds(relation, a, b) is holds(converse, b, a)


def test_directions_are_the_larger_distance():
    assert direction(thing(10, 30), thing(40, 40)) == "left of"
    assert direction(thing(40, 30), thing(10, 40)) == "right of"
    assert direction(thing(10, 10), thing(20, 40)) == "above"
    assert direction(thing(10, 50), thing(20, 10)) == "below"
    assert direction(thing(30, 30), thing(30, 31, 13.0)) == "inside"


@pytest.fixture(scope="module")
def twins():
    """Relation -> many twins."""
    rng = np.random.default_rng(1)
    return {r: [random_twins(rng, r, int(rng.integers(2, 5))) for _ in range(4000)] for r in SPATIAL}


@pytest.mark.parametrize("relation", SPATIAL)
def test_the_relation_holds_in_the_first_picture_only(twins, relation):
    for twin in twins[relation]:
        pairs = [(picture.things[twin.a], picture.things[twin.b]) for picture in twin.pictures]
        assert [holds(relation, a, b) for a, b in pairs] == [True, False] and twin.relation == relation
        assert relation != "inside" or pairs[0][1].shape in CONTAINERS


@pytest.mark.parametrize("relation", SPATIAL)
def test_twins_differ_only_in_the_places_of_the_two_things(twins, relation):
    for twin in twins[relation]:
        first, second = (picture.things for picture in twin.pictures)
        assert len(first) == len(second) in (2, 3, 4)
        assert {t.shape for t in first} == {t.shape for t in second} and len({t.shape for t in first}) == len(first)
        assert len({t.colour for t in first}) == len(first)
        for i, (one, other) in enumerate(zip(first, second, strict=True)):
            assert (one.shape, one.colour, one.radius) == (other.shape, other.colour, other.radius)
            assert i in (twin.a, twin.b) or one == other
        assert first != second


@pytest.mark.parametrize("relation", SPATIAL)
def test_things_are_whole_and_overlap_only_if_one_is_inside_the_other(twins, relation):
    for twin in twins[relation][:1000]:
        for picture in twin.pictures:
            for t in picture.things:
                assert t.radius <= min(t.x, t.y) and max(t.x, t.y) <= SIZE - t.radius
            for one, other in itertools.combinations(picture.things, 2):  # the later one is painted over the other
                apart = np.hypot(one.x - other.x, one.y - other.y) >= one.radius + other.radius
                assert apart or holds("inside", other, one)


def accuracy_from_one_place(twins, which):
    """Held-out accuracy of the best guess from the place of one thing, on a grid of 8 x 8, in pictures of twins."""
    right = collections.defaultdict(lambda: np.zeros(2))
    score, half = 0.0, len(twins) // 2
    for number, twin in enumerate(twins):
        for answer, picture in enumerate(twin.pictures):
            t = picture.things[getattr(twin, which)]
            cell = int(t.x // 8), int(t.y // 8)
            if number < half:
                right[cell][answer] += 1
            else:
                score += right[cell].argmax() == answer
    return score / (2 * (len(twins) - half))


@pytest.mark.parametrize("which", ["a", "b"])
@pytest.mark.parametrize("relation", SPATIAL)
def test_what_the_place_of_one_thing_tells(twins, relation, which):
    """Nothing about "inside" and "beside". In the four directions it must tell something: what is left of another thing
    is further left on average than what is right of one, so the means of its place differ."""
    accuracy = accuracy_from_one_place(twins[relation], which)
    if relation in DIRECTIONS:
        assert 0.6 < accuracy < 0.68
    else:
        assert abs(accuracy - 0.5) < 0.03


def test_twins_are_drawn_alike_but_for_the_two_things():
    """With one generator's state, background, noise and colours are the same: equal pixels away from the two things."""
    twin = random_twins(np.random.default_rng(5), "left of", 3)
    one, other = (np.asarray(draw_scene(picture, np.random.default_rng(6)), int) for picture in twin.pictures)
    y, x = np.mgrid[:SIZE, :SIZE]
    far = np.ones((SIZE, SIZE), bool)
    for picture in twin.pictures:
        for t in (picture.things[twin.a], picture.things[twin.b]):
            far &= np.hypot(x + 0.5 - t.x, y + 0.5 - t.y) > 1.2 * t.radius + 1
    assert far.any() and (one[far] == other[far]).all() and (one[~far] != other[~far]).any()


def test_later_things_are_painted_over_earlier_ones():
    inside = thing(30, 30, 6.0, "circle"), thing(30, 30, 13.0, "square")
    big, small = Thing("square", "blue", 13.0, 30, 30), Thing("circle", "red", 6.0, 30, 30)
    red, blue = (
        np.asarray(draw_scene(Arrangement(order), np.random.default_rng(0)), int)[30, 30]
        for order in ((big, small), (small, big))
    )
    assert red[0] > 150 > red[2] and blue[2] > 150 > blue[0] and holds("inside", *inside)
