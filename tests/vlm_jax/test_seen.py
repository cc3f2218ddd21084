"""Pictures as a model saw them, and the places of their visual tokens."""

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

import vlm_jax
from vlm_jax.data import Example, load_task
from vlm_jax.prompts import encode
from vlm_jax.seen import seen_images, token_places

MODELS = ("mini-qwen3-vl", "mini-gemma3", "mini-llava")


@pytest.fixture(scope="module", params=MODELS)
def loaded(request):
    return vlm_jax.load(request.param)


def seen(loaded, *examples):
    model, processor = loaded
    batch = encode(examples, processor, model.config)
    found = seen_images(batch.inputs, model.config, processor.image_processor)
    return batch, found, token_places(batch.inputs, model.config, found)


def test_the_picture_is_the_one_that_was_asked_about(loaded):
    """As it was resized; turned or mirrored it is another (the control)."""
    examples = load_task("mini-docvqa", split="test", limit=2)
    _, found, _ = seen(loaded, *examples)
    for example, (image, *_) in zip(examples, found, strict=True):
        original = example.images[0].convert("RGB").resize(image.size)

        def apart(other, original=original):
            return np.abs(np.asarray(other, float) - np.asarray(original, float)).mean()

        assert apart(image) < 3
        assert apart(image.rotate(90)) > 10 and apart(ImageOps.mirror(image)) > 10


@pytest.mark.parametrize("place", [(0, 0), (0, 2), (2, 1)])
def test_a_change_of_the_picture_moves_the_token_at_its_place(loaded, place):
    """The embedding of the token whose cell is painted changes most."""
    model, _ = loaded
    plain = Image.new("RGB", (64, 64), (230, 230, 230))
    _, (one,), _ = seen(loaded, Example("a", (plain,), "What?", ("x",)))
    row, column = place
    height, width = 64 // one.rows, 64 // one.columns
    painted = plain.copy()
    painted.paste((200, 30, 30), (column * width, row * height, (column + 1) * width, (row + 1) * height))
    batch, found, places = seen(loaded, *(Example("a", (image,), "What?", ("x",)) for image in (plain, painted)))
    assert [(one.rows, one.columns) for one in found] == [(one.rows, one.columns)] * 2
    x = np.asarray(jax.jit(lambda inputs: model.embed(inputs, (), {})[0].x)(batch.inputs.turned()))
    changed = np.linalg.norm(x[1] - x[0], axis=-1)
    assert tuple(places[1, changed.argmax()]) == (1, row, column)


def test_every_place_has_one_token(loaded):
    examples = load_task("mini-docvqa", split="test", limit=2)
    batch, found, places = seen(loaded, *examples)
    for number, one in enumerate(found):
        cells = [tuple(place[1:]) for place in places[number] if place[0] == number]
        assert cells == [(row, column) for row in range(one.rows) for column in range(one.columns)]
    assert ((places[..., 0] >= 0) == batch.spans["image"]).all()


def test_pictures_of_other_shapes():
    """Qwen's grids follow the picture, and agree with its position ids."""
    loaded = vlm_jax.load("mini-qwen3-vl")
    wide = Image.new("RGB", (96, 48), (9, 99, 200))
    batch, found, places = seen(loaded, Example("a", (wide, wide.rotate(90, expand=True)), "What?", ("x",)))
    assert [(one.rows, one.columns) for one in found] == [(3, 6), (6, 3)]
    for number, one in enumerate(found):
        where = places[0, :, 0] == number
        rows, columns = np.asarray(batch.inputs.position_ids)[1:, 0, where]
        np.testing.assert_array_equal(places[0, where, 1], rows - rows.min())
        np.testing.assert_array_equal(places[0, where, 2], columns - columns.min())
        assert np.abs(np.asarray(one.image, int) - (9, 99, 200)).max() <= 2


def test_text_has_no_pictures():
    _, found, places = seen(vlm_jax.load("mini-qwen3-vl"), Example("a", (), "What?", ("x",)))
    assert found == [] and (places == -1).all()
