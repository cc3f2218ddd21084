"""Batches of pictures of many sizes: each has little padding behind its patches, and the same results."""

import numpy as np
import pytest
from PIL import Image

import vlm_jax
from vlm_jax.data import Example
from vlm_jax.inputs import coarse_bucket
from vlm_jax.prompts import batches, encode

SIZES = ((32, 32), (48, 96), (64, 64), (160, 96), (192, 224))


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def loaded():
    return vlm_jax.load("mini-qwen3-vl")


@pytest.fixture(scope="module")
def examples():
    """One, two or no picture each."""
    images = [picture(*size) for size in SIZES]
    pictures = [(image,) for image in images] + [(images[1], images[3]), ()]
    return [Example(str(i), shown, "What is this?", ("cat",)) for i, shown in enumerate(pictures)]


def test_few_sizes():
    rooms = sorted({coarse_bucket(length, 64) for length in range(1, 64 * 200)})
    assert len(rooms) <= 16 and all(room % 64 == 0 for room in rooms)
    for length in range(1, 64 * 200, 7):
        assert length <= coarse_bucket(length, 64) < max(65, 1.5 * (length + 63))


def test_large_pictures_pad_only_their_own_batches(loaded, examples):
    model, processor = loaded
    whole = encode(examples, processor, model.config)
    longest = whole.inputs.images.patch_mask.shape[1]
    patches = {}
    for rows, batch in batches(examples, processor, model.config, 1):
        images = batch.inputs.images
        real = int(images.patch_mask.sum(1).max())
        patches[rows[0]] = images.patch_mask.shape[1]
        assert real <= patches[rows[0]] <= longest
        assert images.stride * (longest // whole.inputs.images.stride) == patches[rows[0]]
        # The visual tokens of a prompt are the same, one by one.
        index = batch.inputs.image_index[0]
        tokens = index[index >= 0]
        counts = [int(count) // 4 for count in images.patch_mask.sum(1) if count]
        want = [image * images.stride + token for image, count in enumerate(counts) for token in range(count)]
        assert tokens.tolist() == want
    assert min(patches.values()) < longest == max(patches.values())


def test_trimming_changes_no_result(loaded, examples, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr("vlm_jax.inputs.Inputs.trimmed", lambda inputs: inputs)
    longest = [batch for _, batch in batches(examples, processor, model.config, 2)]
    monkeypatch.undo()
    counts = []
    for (rows, batch), untrimmed in zip(batches(examples, processor, model.config, 2), longest, strict=True):
        counts.append([len(x.inputs.images.patch_mask[0]) if x.inputs.images else 0 for x in (batch, untrimmed)])
        read = [np.asarray(model(inputs).logits) for inputs in (batch.inputs, untrimmed.inputs)]
        for i in range(len(rows)):
            real = batch.inputs.attention_mask[i]
            other = untrimmed.inputs.attention_mask[i]
            np.testing.assert_allclose(read[0][i][real], read[1][i][other], atol=5e-5)
    assert any(trimmed < whole for trimmed, whole in counts)


def test_towers_of_one_size_stay_as_they_are(examples):
    model, processor = vlm_jax.load("mini-gemma3")
    inputs = encode(examples[:2], processor, model.config).inputs
    assert inputs.trimmed() is inputs
