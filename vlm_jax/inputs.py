"""What a model reads: token ids, positions and patches as fixed-shape arrays.

Everything that depends on a *value* (image grids, where images sit, padding) is resolved here, in NumPy, so
that the model itself is shape-static and compiles once per bucket.
"""

import flax.struct
import jax
import numpy as np

from vlm_jax.config import Config
from vlm_jax.errors import UserError

#: Sequence lengths and patch counts are rounded up to multiples of these, so that many samples meet few shapes.
LENGTH_BUCKET, PATCH_BUCKET = 16, 64


@flax.struct.dataclass
class Images:
    """Patches of ``I`` images, padded to one patch count ``P``.

    pixel_values ``(I, P, patch_dim)``; patch_mask ``(I, P)`` bool; stride: visual tokens per image, padding included.
    Towers that take any size also need: grid_positions ``(I, P, 2)`` row and column; and, where position embeddings
    are interpolated, position_index, position_weight ``(I, P, 4)``: the four that a patch mixes.
    """

    pixel_values: jax.Array
    patch_mask: jax.Array
    grid_positions: jax.Array | None = None
    position_index: jax.Array | None = None
    position_weight: jax.Array | None = None
    stride: int = flax.struct.field(pytree_node=False, default=0)


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
            pixel_values: ``(patches of all images, patch_dim)`` with image_grid_thw ``(I, 3)``, in patches (Qwen),
                or ``(I, C, H, W)`` (towers of one size).
            mm_token_type_ids, token_type_ids: ``(B, T)``; taken from the image token where absent.

        Raises:
            UserError: if the image tokens in the prompt and the images do not match.
        """
        ids = np.asarray(input_ids, np.int32)
        mask = np.ones_like(ids, bool) if attention_mask is None else np.asarray(attention_mask, bool)
        kinds = mm_token_type_ids if mm_token_type_ids is not None else token_type_ids
        visual = (ids == config.image_token_id) if kinds is None else (np.asarray(kinds) == 1)
        visual &= mask
        images, counts = None, []
        if pixel_values is not None and len(pixel_values):
            if config.vision is None:
                raise UserError(f"{config.family} is a text-only model: leave the images out")
            images, counts = config.vision.images(np.asarray(pixel_values, np.float32), image_grid_thw)
        if visual.sum() != sum(counts):
            raise UserError(
                f"the prompts hold {visual.sum()} image tokens but the {len(counts)} images make {sum(counts)}: "
                "pass the arrays of one processor call unchanged"
            )
        if config.text.mrope and images is not None:
            merge = config.vision.spatial_merge_size
            positions = rope_index(mask, visual, np.asarray(image_grid_thw, int).reshape(-1, 3), merge)
        else:
            positions = np.broadcast_to(np.where(mask, np.cumsum(mask, 1) - 1, 0).astype(np.int32), (3, *mask.shape))
        if images is None:
            return cls(ids, mask, positions)
        index = np.full(ids.shape, -1, np.int32)
        index[visual] = np.concatenate([image * images.stride + np.arange(count) for image, count in enumerate(counts)])
        return cls(ids, mask, positions, images, index)

    @property
    def is_image(self) -> jax.Array | None:
        """Which tokens are visual ones ``(B, T)``; None without images."""
        return None if self.image_index is None else self.image_index >= 0

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

    def aligned(self, images: int, patches: int, at: np.ndarray | None = None) -> "Inputs":
        """The same rows (NumPy arrays only), each followed by its own ``images`` images of ``patches`` patches, padding
        included: so that whoever gets some of the rows gets their images with them.

        Args:
            images, patches: no fewer than a row, or an image, has.
            at: which rows of a larger batch these are, whose visual tokens are counted through all of its images.
        """
        if self.images is None:
            return self
        old, count = self.images, len(self.input_ids)
        assert patches >= old.patch_mask.shape[1], (patches, old.patch_mask.shape)
        stride = old.stride * patches // old.patch_mask.shape[1]
        index, source = self.image_index.copy(), np.full(count * images, -1)
        for row, place in enumerate(np.arange(count) if at is None else at):
            there = index[row] >= 0
            used, slot = np.unique(index[row, there] // old.stride, return_inverse=True)
            assert len(used) <= images, (len(used), images)
            source[row * images : row * images + len(used)] = used
            index[row, there] = (place * images + slot) * stride + index[row, there] % old.stride

        def spread(array):
            new = np.zeros((len(source), patches, *array.shape[2:]), array.dtype)
            new[source >= 0, : array.shape[1]] = array[source[source >= 0]]
            return new

        return self.replace(images=jax.tree.map(spread, old).replace(stride=stride), image_index=index)

    def turned(self) -> "Inputs":
        """With position_ids as ``(B, 3, T)``, so that rows lead in every array; and back."""
        return self.replace(position_ids=self.position_ids.swapaxes(0, 1))

    def cut(self, length: int) -> "Inputs":
        """The first ``length`` tokens of every row."""
        return self.replace(
            input_ids=self.input_ids[:, :length],
            attention_mask=self.attention_mask[:, :length],
            position_ids=self.position_ids[:, :, :length],
            image_index=None if self.image_index is None else self.image_index[:, :length],
        )


def rope_index(mask: np.ndarray, visual: np.ndarray, grids: np.ndarray, merge: int) -> np.ndarray:
    """Multimodal rotary positions ``(3, B, T)`` (Qwen-VL): text counts on all three axes together; an image that
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
            run = visual[row, where[at : at + block.shape[1]]]
            if len(run) < block.shape[1] or not run.all():
                raise UserError(
                    f"row {row} breaks off an image of {block.shape[1]} tokens: keep each image's tokens together"
                )
            positions[:, row, where[at : at + block.shape[1]]] = block
            current, at = current + max(height, width), at + block.shape[1]
    return positions


def bucket(length: int, step: int = LENGTH_BUCKET) -> int:
    """``length`` rounded up to a multiple of ``step``."""
    return -(-length // step) * step
