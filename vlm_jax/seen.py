"""Pictures as a model saw them, and where each visual token lies in them."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from vlm_jax.config import Config, VisionConfig
from vlm_jax.inputs import Inputs
from vlm_jax.processor import Processor


class Seen(NamedTuple):
    """An image after the model's image processor, and the numbers of rows and columns of its visual tokens; 0 for an
    image that only fills a batch up."""

    image: Image.Image
    rows: int
    columns: int


class Prompt(NamedTuple):
    """The tokens of one prompt as a reader sees them.

    Attributes:
        tokens: the text of each.
        pictures: its images, as the model saw them.
        grids: rows and columns of each image's visual tokens.
        places: image, row and column of each token, -1 three times where it is no visual token.
    """

    tokens: list[str]
    pictures: list[Image.Image]
    grids: list[tuple[int, int]]
    places: Int[np.ndarray, "tokens 3"]


def read_prompt(inputs: Inputs, mask: Bool[np.ndarray, "tokens"], config: Config, processor: Processor) -> Prompt:
    """The tokens of a batch's only prompt that ``mask`` marks."""
    seen = seen_images(inputs, config, processor.image_processor)
    ids = np.asarray(inputs.input_ids)[0][mask]
    texts = [processor.tokenizer.decode([int(token)]) for token in ids]
    grids = [(one.rows, one.columns) for one in seen]
    return Prompt(texts, [one.image for one in seen], grids, token_places(inputs, config, seen)[0][mask])


def seen_images(inputs: Inputs, config: Config, image_processor: Any) -> list[Seen]:
    """The images of a batch, in the order of the prompts: resized, cropped and padded as the model saw them."""
    if inputs.images is None:
        return []
    images, vision = inputs.images, config.vision
    assert vision is not None, "a model with images has a vision tower"
    mean, std = (np.asarray(getattr(image_processor, name)) for name in ("image_mean", "image_std"))
    found = []
    for number, valid in enumerate(np.asarray(images.patch_mask)):
        if not valid.any():
            found.append(Seen(Image.new("RGB", (1, 1)), 0, 0))
            continue
        patches, places = np.asarray(images.pixel_values[number])[valid], _places(images.grid_positions, number, valid)
        rows, columns = places.max(0) + 1
        # (patches, channels, height, width); of a tower for videos the first of two equal frames
        pixels = patches.reshape(len(patches), *vision.conv_shape)
        pixels = pixels[:, :, 0] if pixels.ndim == 5 else pixels
        canvas = np.zeros((rows, columns, *pixels.shape[1:]))
        canvas[places[:, 0], places[:, 1]] = pixels
        side = _patches_in_a_row(vision)
        canvas = canvas[: rows // side * side, : columns // side * side]  # the rest reaches no visual token
        height, width = canvas.shape[0] * pixels.shape[2], canvas.shape[1] * pixels.shape[3]
        whole = canvas.transpose(0, 3, 1, 4, 2).reshape(height, width, -1)
        coloured = np.clip((whole * std + mean) * 255, 0, 255).round().astype(np.uint8)
        found.append(Seen(Image.fromarray(coloured), int(rows) // side, int(columns) // side))
    return found


def token_places(inputs: Inputs, config: Config, seen: list[Seen]) -> Int[np.ndarray, "batch tokens 3"]:
    """The image of each visual token, and its row and column there; -1 three times for other tokens. A class token,
    which stands for the whole image, has no place either.

    Args:
        seen: the batch's images, from :func:`seen_images`.
    """
    places = np.full((*inputs.input_ids.shape, 3), -1, np.int32)
    if inputs.images is None or inputs.image_index is None or config.vision is None:
        return places
    index, stride = np.asarray(inputs.image_index), inputs.images.stride
    for row, token in np.argwhere(index >= 0):
        number, place = divmod(int(index[row, token]), stride)
        place -= _class_tokens(config.vision)
        if place >= 0:
            places[row, token] = number, *divmod(place, seen[number].columns)
    return places


def _places(grid_positions: Any, number: int, valid: np.ndarray) -> Int[np.ndarray, "patches 2"]:
    """Row and column of each patch of an image."""
    if grid_positions is not None:
        return np.asarray(grid_positions[number])[valid]
    count = int(valid.sum())
    return np.stack(np.divmod(np.arange(count), math.isqrt(count)), -1)


def _patches_in_a_row(vision: VisionConfig) -> int:
    """How many patches one visual token spans in each direction."""
    if vision.any_size:
        return vision.spatial_merge_size
    return vision.side // math.isqrt(vision.tokens - _class_tokens(vision))


def _class_tokens(vision: VisionConfig) -> int:
    """How many of an image's visual tokens come before those of its patches."""
    return int(getattr(vision, "keep_cls", False))
