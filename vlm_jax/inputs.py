"""What a model reads: token ids, positions and patches as fixed-shape arrays.

Everything that depends on a *value* (image grids, where images sit, padding) is resolved here, in NumPy, so
that the model itself is shape-static and compiles once per bucket.
"""

import math

import flax.struct
import jax
import numpy as np

from vlm_jax.config import Config, VisionConfig
from vlm_jax.errors import UserError

#: Sequence lengths and patch counts are rounded up to multiples of these, so that many samples meet few shapes.
LENGTH_BUCKET, PATCH_BUCKET = 16, 64


@flax.struct.dataclass
class Images:
    """Patches of ``I`` images, padded to the bucket ``P`` of the largest patch count.

    pixel_values ``(I, P, patch_dim)``; patch_mask ``(I, P)`` bool; grid_positions ``(I, P, 2)`` row and column;
    position_index, position_weight ``(I, P, 4)``: the four learned position embeddings that a patch interpolates;
    merge: how many consecutive patches become one visual token.
    """

    pixel_values: jax.Array
    patch_mask: jax.Array
    grid_positions: jax.Array
    position_index: jax.Array
    position_weight: jax.Array
    merge: int = flax.struct.field(pytree_node=False)

    @property
    def stride(self) -> int:
        """Visual tokens per image, padding included."""
        return self.patch_mask.shape[-1] // self.merge


@flax.struct.dataclass
class Inputs:
    """A batch of ``B`` prompts of ``T`` tokens.

    input_ids ``(B, T)`` int32; attention_mask ``(B, T)`` bool; position_ids ``(3, B, T)`` int32 (temporal, height,
    width); images, or None for text; image_index ``(B, T)`` int32: which visual token (counted through all images,
    padding included) replaces the embedding, -1 where none does.
    """

    input_ids: jax.Array
    attention_mask: jax.Array
    position_ids: jax.Array
    images: Images | None = None
    image_index: jax.Array | None = None

    @classmethod
    def from_hf(
        cls,
        config: Config,
        *,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        image_grid_thw=None,
        mm_token_type_ids=None,
        token_type_ids=None,
    ) -> "Inputs":
        """Inputs from what a transformers processor returns, as NumPy arrays.

        Args:
            input_ids, attention_mask: ``(B, T)``, padded on either side.
            pixel_values: ``(patches of all images, patch_dim)``; image_grid_thw: ``(I, 3)``, in patches.
            mm_token_type_ids, token_type_ids: ``(B, T)``; taken from the image token where absent.

        Raises:
            UserError: if the image tokens in the prompt and the images do not match.
        """
        ids = np.asarray(input_ids, np.int32)
        mask = np.ones_like(ids, bool) if attention_mask is None else np.asarray(attention_mask, bool)
        kinds = mm_token_type_ids if mm_token_type_ids is not None else token_type_ids
        visual = (ids == config.image_token_id) if kinds is None else (np.asarray(kinds) == 1)
        visual &= mask
        grids = np.zeros((0, 3), int) if image_grid_thw is None else np.asarray(image_grid_thw, int).reshape(-1, 3)
        merge = config.vision.spatial_merge_size
        counts = grids.prod(1) // merge**2
        if visual.sum() != counts.sum():
            raise UserError(
                f"the prompts hold {visual.sum()} image tokens but the {len(grids)} images make {counts.sum()}: "
                "pass the arrays of one processor call unchanged"
            )
        patches = 0 if pixel_values is None else len(pixel_values)
        if patches != grids.prod(1).sum():
            raise UserError(
                f"pixel_values has {patches} patches but image_grid_thw describes {grids.prod(1).sum()}: "
                "pass the arrays of one processor call unchanged"
            )
        positions = rope_index(mask, visual, grids, merge)
        if not len(grids):
            return cls(ids, mask, positions)
        images = patch_images(np.asarray(pixel_values, np.float32), grids, config.vision)
        index = np.full(ids.shape, -1, np.int32)
        index[visual] = np.concatenate([image * images.stride + np.arange(count) for image, count in enumerate(counts)])
        return cls(ids, mask, positions, images, index)

    def take(self, rows, images: int | None = None) -> "Inputs":
        """The batch of some ``rows`` (NumPy arrays only), with just their images, padded to ``images`` of them."""
        rows = np.asarray(rows)
        text = Inputs(self.input_ids[rows], self.attention_mask[rows], self.position_ids[:, rows])
        if self.images is None:
            return text
        index, stride = self.image_index[rows].copy(), self.images.stride
        there = index >= 0
        used, place = np.unique(index[there] // stride, return_inverse=True)
        index[there] = place * stride + index[there] % stride
        missing = max(0, (images or 0) - len(used))
        if not len(used) + missing:
            return text

        def pick(array):
            return np.pad(array[used], [(0, missing)] + [(0, 0)] * (array.ndim - 1))

        return text.replace(images=jax.tree.map(pick, self.images), image_index=index)

    def cut(self, length: int) -> "Inputs":
        """The first ``length`` tokens of every row."""
        return self.replace(
            input_ids=self.input_ids[:, :length],
            attention_mask=self.attention_mask[:, :length],
            position_ids=self.position_ids[:, :, :length],
            image_index=None if self.image_index is None else self.image_index[:, :length],
        )


def rope_index(mask: np.ndarray, visual: np.ndarray, grids: np.ndarray, merge: int) -> np.ndarray:
    """Multimodal rotary positions ``(3, B, T)`` (Qwen3-VL): text counts on all three axes together; an image that
    starts at ``p`` has temporal ``p``, height ``p + row``, width ``p + column``, and moves the count on by the
    longer side of its merged grid. Padding has position 0."""
    positions = np.zeros((3, *mask.shape), np.int32)
    pending = iter(grids)
    for row in range(len(mask)):
        where = np.flatnonzero(mask[row])
        current, at = 0, 0
        while at < len(where):
            if not visual[row, where[at]]:
                positions[:, row, where[at]] = current
                current, at = current + 1, at + 1
                continue
            frames, height, width = next(pending) // np.array([1, merge, merge])
            block = np.stack(np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij"))
            block = block.reshape(3, -1) + current
            if not visual[row, where[at : at + block.shape[1]]].all():
                raise UserError(
                    f"row {row} breaks off an image of {block.shape[1]} tokens: keep each image's tokens together"
                )
            positions[:, row, where[at : at + block.shape[1]]] = block
            current, at = current + max(height, width), at + block.shape[1]
    return positions


def patch_images(pixel_values: np.ndarray, grids: np.ndarray, config: VisionConfig) -> Images:
    """Pads the packed patches of several images to ``(I, P, patch_dim)`` and works out their positions."""
    counts, merge = grids.prod(1), config.spatial_merge_size
    longest = bucket(int(counts.max()), math.lcm(PATCH_BUCKET, merge**2))
    images = Images(
        np.zeros((len(grids), longest, pixel_values.shape[-1]), np.float32),
        np.arange(longest) < counts[:, None],
        np.zeros((len(grids), longest, 2), np.int32),
        np.zeros((len(grids), longest, 4), np.int32),
        np.zeros((len(grids), longest, 4), np.float32),
        merge**2,
    )
    starts = np.concatenate([[0], np.cumsum(counts)])
    side = int(config.num_position_embeddings**0.5)
    for i, (frames, height, width) in enumerate(grids):
        n = counts[i]
        images.pixel_values[i, :n] = pixel_values[starts[i] : starts[i + 1]]
        images.grid_positions[i, :n] = np.tile(merge_order(height, width, merge), (frames, 1))
        row, column = images.grid_positions[i, :n].T
        images.position_index[i, :n], images.position_weight[i, :n] = bilinear(
            np.linspace(0, side - 1, height, dtype=np.float32)[row],
            np.linspace(0, side - 1, width, dtype=np.float32)[column],
            side,
        )
    return images


def merge_order(height: int, width: int, merge: int) -> np.ndarray:
    """Row and column of every patch ``(height * width, 2)``, in the processor's order: merge block by merge block."""
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    blocks = grid.reshape(height // merge, merge, width // merge, merge, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def bilinear(row: np.ndarray, column: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The four cells of a ``side x side`` table around fractional coordinates, and their weights, ``(n, 4)`` each."""
    top, left = row.astype(int), column.astype(int)
    down, right = np.minimum(top + 1, side - 1), np.minimum(left + 1, side - 1)
    y, x = row - top, column - left
    index = np.stack([top * side + left, top * side + right, down * side + left, down * side + right], -1)
    weight = np.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], -1)
    return index.astype(np.int32), weight.astype(np.float32)


def bucket(length: int, step: int = LENGTH_BUCKET) -> int:
    """``length`` rounded up to a multiple of ``step``."""
    return -(-length // step) * step
