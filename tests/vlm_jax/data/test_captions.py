"""Captions tell everything in the picture, and nothing else."""

import collections
import re

from vlm_jax.data import load_task
from vlm_jax.data.arrangements import direction
from vlm_jax.data.captions import caption
from vlm_jax.data.miniworld import make_scene
from vlm_jax.data.scenes import Arrangement, Chart, Emblem, Form, Glyphs, Signs, Thing
from vlm_jax.data.world import ENTITIES

STAR = Thing("star", "red", 6.0, 10, 30)
RING = Thing("ring", "blue", 13.0, 40, 32)


def test_captions_of_every_kind_of_scene():
    assert caption(Emblem(ENTITIES[0])) == f"{ENTITIES[0].look.capitalize()}."
    assert caption(Glyphs("K")) == "The text K."
    assert caption(Form(((0, "FEE", "42"), (2, "AGE", "17")))) == "A form with FEE 42 and AGE 17."
    assert caption(Chart(((0, "red", 3), (1, "blue", 5), (3, "green", 8)))) == (
        "A chart with red 3, blue 5 and green 8."
    )
    assert caption(Signs(((0, "red", "MAP"),))) == "Signs with red MAP."
    assert caption(Arrangement((RING, STAR))) == "A small red star and a big blue ring right of the star."
    dot = Thing("circle", "green", 6.0, 40, 32)
    assert caption(Arrangement((RING, STAR, dot))) == (
        "A small red star, a big blue ring right of the star and a small green circle inside the ring."
    )
    assert caption(Arrangement((RING, dot))) == "A big blue ring and a small green circle inside the ring."


def test_every_thing_of_an_arrangement_is_told_once_and_in_its_place():
    kinds = collections.Counter()
    for index, example in enumerate(load_task("mini-caption", split="train", limit=300)):
        scene, text = make_scene("mini-caption", "train", index), example.answers[0]
        kinds[example.subtask] += 1
        assert text.endswith(".") and text.count(".") == 1 and example.family is None
        if not isinstance(scene, Arrangement):
            continue
        told = re.findall(r"[Aa] (small|big) (\w+) (\w+)(?: (left of|right of|above|below|inside) the (\w+))?", text)
        by_shape = {t.shape: t for t in scene.things}
        assert sorted(told_shape for _, _, told_shape, *_ in told) == sorted(by_shape)
        assert [relation for *_, relation, _ in told].count("") == 1
        for size, colour, shape, relation, other in told:
            assert (by_shape[shape].size, by_shape[shape].colour) == (size, colour)
            assert not relation or direction(by_shape[shape], by_shape[other]) == relation
    assert kinds.keys() == {"emblem", "form", "chart", "signs", "arrangement"} and kinds["arrangement"] > 70
