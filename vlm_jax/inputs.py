"""What a model reads: token ids, positions and patches as arrays of fixed shapes.

Everything that depends on a *value* (image grids, where images are, padding) is computed here, in NumPy. So the model
itself depends on shapes only, and compiles once per bucket.
"""

import math
from collections.abc import Sequence
from typing import Any

import chex
import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from vlm_jax.config import Config
from vlm_jax.errors import UserError
from vlm_jax.nn.visibility import Tokens
from vlm_jax.registers import Registers, image_ends, place
from vlm_jax.showing import shown
from vlm_jax.typing import ArrayLike

#: Sequence lengths and patch counts are rounded up to multiples of these, so that many samples have few shapes.
LENGTH_BUCKET, PATCH_BUCKET = 16, 64


@shown
@flax.struct.dataclass
class Images:
    """The patches of a batch of images, padded to the same number of patches.

    patch_mask: False for padding.
    grid_positions: row and column of each patch, for towers that take images of any size.
    position_index, position_weight: the four position embeddings that a patch mixes, for towers that interpolate them.
    stride: visual tokens per image, padding included.
    """

    pixel_values: Float[ArrayLike, "images patches patch_dim"]
    patch_mask: Bool[ArrayLike, "images patches"]
    grid_positions: Int[ArrayLike, "images patches 2"] | None = None
    position_index: Int[ArrayLike, "images patches 4"] | None = None
    position_weight: Float[ArrayLike, "images patches 4"] | None = None
    stride: int = flax.struct.field(pytree_node=False, default=0)


@shown
@flax.struct.dataclass
class Inputs:
    """A batch of prompts, padded to the same number of tokens.

    attention_mask: False for padding.
    position_ids: temporal, height and width position of each token.
    images: None for text.
    image_index: which visual token replaces the token's embedding, -1 for none. Visual tokens are numbered through all
        images of the batch, padding included. None for text.
    register_index: the number of each register within its image, -1 for other tokens. None for text, and for a model
        without registers.
    answered: whether the gold answers stand behind the prompts, so that nothing can be generated there.
    """

    input_ids: Int[ArrayLike, "batch tokens"]
    attention_mask: Bool[ArrayLike, "batch tokens"]
    position_ids: Int[ArrayLike, "3 batch tokens"]
    images: Images | None = None
    image_index: Int[ArrayLike, "batch tokens"] | None = None
    register_index: Int[ArrayLike, "batch tokens"] | None = None
    answered: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def from_hf(
        cls,
        config: Config,
        *,
        input_ids: Any,
        attention_mask: Any = None,
        pixel_values: Any = None,
        image_grid_thw: Any = None,
        mm_token_type_ids: Any = None,
        token_type_ids: Any = None,
        register_index: Any = None,
    ) -> "Inputs":
        """Inputs, as NumPy arrays, from what a transformers processor returns. If the model has registers, they are put
        behind the images.

        Args:
            input_ids, attention_mask: ``(batch, tokens)``, padded on either side.
            pixel_values: for Qwen ``(patches of all images, patch_dim)``, with image_grid_thw ``(images, 3)``: the
                frames, rows and columns of patches of each image. For towers of one size ``(images, channels, height,
                width)``.
            mm_token_type_ids, token_type_ids: ``(batch, tokens)``, 1 for image tokens. Without them a token is an image
                token if its id is ``config.image_token_id``.
            register_index: if the prompts have registers already, their numbers, as in the field of this name.

        Raises:
            UserError: if the image tokens in the prompts do not match the images.
            AssertionError: for an array of another rank, shape or dtype.
        """
        ids = np.asarray(input_ids)
        chex.assert_type(ids, int)
        ids = ids.astype(np.int32)
        mask = np.ones_like(ids, bool) if attention_mask is None else np.asarray(attention_mask, bool)
        token_types = mm_token_type_ids if mm_token_type_ids is not None else token_type_ids
        visual = (ids == config.image_token_id) if token_types is None else (np.asarray(token_types) == 1)
        chex.assert_rank([ids, mask, visual], 2)
        chex.assert_equal_shape([ids, mask, visual])
        visual &= mask
        vision, images, counts = config.vision, None, []
        if pixel_values is not None and len(pixel_values):
            if vision is None:
                raise UserError(f"{config.family} is a text-only model: leave the images out")
            pixels = np.asarray(pixel_values)
            chex.assert_type(pixels, float)
            images, counts = vision.images(pixels.astype(np.float32), image_grid_thw)
        if visual.sum() != sum(counts):
            raise UserError(
                f"the prompts hold {visual.sum()} image tokens but the {len(counts)} images make {sum(counts)}: "
                "pass the arrays of one processor call unchanged"
            )
        registers = config.text.registers
        if images is None:
            register_index = None
        elif registers is not None and register_index is None:
            ids, mask, visual, register_index = _with_registers(ids, mask, visual, counts, registers)
        stays = np.zeros_like(mask)
        if registers is not None and register_index is not None and registers.positions == "first":
            stays = np.asarray(register_index) > 0
        if config.text.mrope and vision is not None and images is not None:
            merge = vision.spatial_merge_size
            positions = rope_index(mask, visual, np.asarray(image_grid_thw, int).reshape(-1, 3), merge, stays)
        else:
            positions = np.where(mask, np.cumsum(mask & ~stays, 1) - 1, 0)
            positions = np.broadcast_to(positions.astype(np.int32), (3, *mask.shape))
        if images is None:
            return cls(ids, mask, positions)
        index = np.full(ids.shape, -1, np.int32)
        index[visual] = np.concatenate([image * images.stride + np.arange(count) for image, count in enumerate(counts)])
        return cls(ids, mask, positions, images, index, register_index)

    @property
    def is_image(self) -> Bool[ArrayLike, "batch tokens"] | None:
        """Which tokens are visual ones; None without images."""
        return None if self.image_index is None else self.image_index >= 0

    @property
    def tokens(self) -> Tokens:
        """What decides who sees whom, besides the order of the tokens."""
        return Tokens(self.attention_mask, self.is_image, self.register_index)

    def take(self, rows: Sequence[int] | Int[np.ndarray, " rows"], images: int | None = None) -> "Inputs":
        """The batch of these ``rows``, with only their images (NumPy arrays only).

        Args:
            images: pads the images to at least this many.
        """
        rows = np.asarray(rows)
        text = Inputs(
            self.input_ids[rows], self.attention_mask[rows], self.position_ids[:, rows], answered=self.answered
        )
        if self.images is None or self.image_index is None:
            return text
        index, stride = self.image_index[rows].copy(), self.images.stride
        is_image = index >= 0
        used_images, new_number = np.unique(index[is_image] // stride, return_inverse=True)
        index[is_image] = new_number * stride + index[is_image] % stride
        missing = max(0, (images or 0) - len(used_images))
        if not len(used_images) + missing:
            return text

        def pick(array):
            return np.pad(array[used_images], [(0, missing)] + [(0, 0)] * (array.ndim - 1))

        registers = None if self.register_index is None else self.register_index[rows]
        return text.replace(images=jax.tree.map(pick, self.images), image_index=index, register_index=registers)

    def aligned(self, images: int, patches: int, at: Int[np.ndarray, " batch"] | None = None) -> "Inputs":
        """The same rows with the images laid out by row: ``images`` images for each row, padding included.

        Every row then owns an equal, contiguous part of the images' arrays. So a process or a device that gets some of
        the rows gets their images too. (NumPy arrays only.)

        Args:
            images: images per row, at least as many as any row has.
            patches: patches per image, at least as many as there are now.
            at: where these rows are in a larger batch, whose visual tokens are numbered through all of its images.
        """
        if self.images is None or self.image_index is None:
            return self
        old, count = self.images, len(self.input_ids)
        assert patches >= old.patch_mask.shape[1], (patches, old.patch_mask.shape)
        stride = old.stride * patches // old.patch_mask.shape[1]
        index, source = self.image_index.copy(), np.full(count * images, -1)
        for row, batch_row in enumerate(np.arange(count) if at is None else at):
            is_image = index[row] >= 0
            used_images, slot = np.unique(index[row, is_image] // old.stride, return_inverse=True)
            assert len(used_images) <= images, (len(used_images), images)
            source[row * images : row * images + len(used_images)] = used_images
            index[row, is_image] = (batch_row * images + slot) * stride + index[row, is_image] % old.stride

        def spread(array):
            new = np.zeros((len(source), patches, *array.shape[2:]), array.dtype)
            new[source >= 0, : array.shape[1]] = array[source[source >= 0]]
            return new

        return self.replace(images=jax.tree.map(spread, old).replace(stride=stride), image_index=index)

    def trimmed(self) -> "Inputs":
        """The same rows with less padding behind the patches of their images (NumPy arrays only).

        The number of patches is one of few, at most half more than the largest image needs, so that batches of pictures
        of many sizes have few shapes.
        """
        images, index = self.images, self.image_index
        if images is None or index is None or images.grid_positions is None:
            return self  # towers that take one size have no such padding
        patches = images.patch_mask.shape[1]
        merge = patches // images.stride
        needed = coarse_bucket(int(images.patch_mask.sum(1).max()), math.lcm(PATCH_BUCKET, merge))
        if needed >= patches:
            return self
        stride = needed // merge
        moved = np.where(index >= 0, index // images.stride * stride + index % images.stride, -1).astype(index.dtype)
        fewer = jax.tree.map(lambda array: array[:, :needed], images).replace(stride=stride)
        return self.replace(images=fewer, image_index=moved)

    def turned(self) -> "Inputs":
        """Swaps the first two axes of position_ids: ``(3, batch, tokens)`` becomes ``(batch, 3, tokens)``.

        Then the rows come first in every array, as splitting a batch needs. A second call swaps them back.
        """
        return self.replace(position_ids=self.position_ids.swapaxes(0, 1))

    def cut(self, length: int) -> "Inputs":
        """The first ``length`` tokens of every row."""
        return self.replace(
            input_ids=self.input_ids[:, :length],
            attention_mask=self.attention_mask[:, :length],
            position_ids=self.position_ids[:, :, :length],
            image_index=None if self.image_index is None else self.image_index[:, :length],
            register_index=None if self.register_index is None else self.register_index[:, :length],
        )


def _with_registers(
    ids: np.ndarray, mask: np.ndarray, visual: np.ndarray, counts: Sequence[int], registers: Registers
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, mask, visual tokens and registers' numbers of prompts into which registers are put. They are padded on
    the side on which they were; ``counts`` are the visual tokens of each image, through all rows."""
    rows, images = [], list(counts)
    for row_ids, real, row_visual in zip(ids, mask, visual, strict=True):
        own = []
        while sum(own) < row_visual.sum():
            own.append(images.pop(0))
        if sum(own) != row_visual.sum():
            raise UserError("a row of the prompts holds a part of an image: pass the processor's arrays unchanged")
        placed = place(row_ids[real], image_ends(row_visual[real], own), registers)
        rows.append((placed.ids(row_ids[real], registers), placed.kept(row_visual[real]), placed.number))
    length = max(len(row) for row, *_ in rows)
    left = bool((~mask[:, 0]).any() and mask[:, -1].all())

    def padded(arrays: Sequence[np.ndarray], fill: int, dtype: Any) -> np.ndarray:
        out = np.full((len(rows), length), fill, dtype)
        for row, array in zip(out, arrays, strict=True):
            row[length - len(array) if left else 0 :][: len(array)] = array
        return out

    new_ids, new_visual, number = zip(*rows, strict=True)
    pad = int(ids[~mask][0]) if (~mask).any() else 0
    real = padded([np.ones(len(row), bool) for row in new_ids], 0, bool)
    return padded(new_ids, pad, np.int32), real, padded(new_visual, 0, bool), padded(number, -1, np.int32)


def rope_index(
    mask: Bool[np.ndarray, "batch tokens"],
    visual: Bool[np.ndarray, "batch tokens"],
    grids: Int[np.ndarray, "images 3"],
    merge: int,
    stays: Bool[np.ndarray, "batch tokens"] | None = None,
) -> Int32[np.ndarray, "3 batch tokens"]:
    """Temporal, height and width positions of Qwen-VL's multimodal rotary embedding.

    A text token advances all three positions by one. An image that starts at position ``p`` has the temporal position
    ``p``, height ``p + row`` and width ``p + column``; the text after it continues at ``p`` plus the longer side of the
    image's merged grid. Padding has position 0.

    Args:
        mask: False for padding. visual: the image tokens.
        grids: frames, rows and columns of patches of each image, in the order of the prompts.
        merge: patches along the side of a visual token.
        stays: text tokens that have the position of the token before them.
    """
    stays = np.zeros_like(mask) if stays is None else stays
    positions = np.zeros((3, *mask.shape), np.int32)
    pending_grids = iter(grids)
    for row in range(len(mask)):
        columns = np.flatnonzero(mask[row])
        position, done = 0, 0
        while done < len(columns):
            if not visual[row, columns[done]]:
                position -= int(stays[row, columns[done]])
                positions[:, row, columns[done]] = position
                position, done = position + 1, done + 1
                continue
            frames, height, width = next(pending_grids) // np.array([1, merge, merge])
            block = np.stack(np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij"))
            block = block.reshape(3, -1) + position
            image_columns = columns[done : done + block.shape[1]]
            if len(image_columns) < block.shape[1] or not visual[row, image_columns].all():
                raise UserError(
                    f"row {row} breaks off an image of {block.shape[1]} tokens: keep each image's tokens together"
                )
            positions[:, row, image_columns] = block
            position, done = position + max(height, width), done + block.shape[1]
    return positions


def bucket(length: int, step: int = LENGTH_BUCKET) -> int:
    """``length`` rounded up to a multiple of ``step``."""
    return -(-length // step) * step


def coarse_bucket(length: int, step: int) -> int:
    """``length`` rounded up to ``step`` times 1, 2, 3, 4, 6, 8, 12, 16 and so on."""
    steps = max(1, -(-length // step))
    power = 1 << (steps - 1).bit_length()
    return step * (3 * power // 4 if steps <= 3 * power // 4 else power)
