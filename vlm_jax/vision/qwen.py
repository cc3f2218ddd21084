"""What Qwen's two towers share: images of any size as packed patches, 2-D rotary attention, merged tokens."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int, PRNGKeyArray
from PIL import Image

from vlm_jax.config import VisionConfig
from vlm_jax.errors import UserError
from vlm_jax.inputs import PATCH_BUCKET, Images, bucket
from vlm_jax.nn.layers import Linear, attend, rotate
from vlm_jax.nn.windows import Windows, attend_in_windows
from vlm_jax.sites import NO_TAPS, Probe
from vlm_jax.typing import Array, ArrayLike


@dataclasses.dataclass(frozen=True)
class QwenVision(VisionConfig):
    """A tower in which ``spatial_merge_size`` x ``spatial_merge_size`` neighbouring patches become one visual token."""

    temporal_patch_size: int
    spatial_merge_size: int
    rope_theta: float

    @property
    def conv_shape(self) -> tuple[int, ...]:
        return self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size

    @property
    def merge(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2

    @property
    def any_size(self) -> bool:
        return True

    def limit_pixels(self, image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
        size = image_processor.size
        least = (self.patch_size * self.spatial_merge_size) ** 2  # one visual token
        low = size["shortest_edge"] if min_pixels is None else min_pixels
        high = size["longest_edge"] if max_pixels is None else max_pixels
        if not least <= low <= high:
            raise UserError(
                f"a pixel budget of {low} to {high} is not possible: --min-pixels must be at least {least} (one visual "
                "token) and at most --max-pixels"
            )
        image_processor.size = type(size)(shortest_edge=low, longest_edge=high)

    def check_processor(self, image_processor: Any, where: str) -> None:
        own = {
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.spatial_merge_size,
        }
        for field, value in own.items():
            if (found := getattr(image_processor, field, None)) != value:
                raise UserError(
                    f"{where}: {field} = {found!r}, but the vision tower in config.json has {value}: take the image "
                    "processor of this model"
                )
        size = image_processor.size
        low, high = (size.get(edge) if size else None for edge in ("shortest_edge", "longest_edge"))
        if not (isinstance(low, int) and isinstance(high, int) and 1 <= low <= high):
            raise UserError(
                f"{where}: size from {low!r} to {high!r} pixels (shortest_edge, longest_edge) is not possible, only "
                "ascending whole numbers above 0: correct it"
            )

    def size_of(self, image_processor: Any, image: Image.Image) -> tuple[int, int]:
        count = image_processor.get_number_of_image_patches(image.height, image.width)
        return self._padded(count), count // self.merge

    def _padded(self, patches: int) -> int:
        return bucket(patches, math.lcm(PATCH_BUCKET, self.merge))

    def blank(self, count: int, tokens: int) -> dict[str, np.ndarray]:
        side = self.spatial_merge_size * math.isqrt(tokens)
        pixels = np.zeros((count * side**2, self.patch_dim), np.float32)
        return {"pixel_values": pixels, "image_grid_thw": np.array([[1, side, side]] * count)}

    def images(
        self, pixel_values: Float[np.ndarray, "all_patches patch_dim"], image_grid_thw: Any
    ) -> tuple[Images, list[int]]:
        """Splits the packed patches by image and pads each image to the same number of patches."""
        grids = np.zeros((0, 3), int) if image_grid_thw is None else np.asarray(image_grid_thw, int).reshape(-1, 3)
        if (grids[:, 0] != 1).any():
            raise UserError(
                "image_grid_thw describes a video (t > 1), which is not supported: pass its frames as images"
            )
        counts = grids.prod(1)
        if len(pixel_values) != counts.sum():
            raise UserError(
                f"pixel_values has {len(pixel_values)} patches but image_grid_thw describes {counts.sum()}: "
                "pass the arrays of one processor call unchanged"
            )
        longest = self._padded(int(counts.max()))
        pixels = np.zeros((len(grids), longest, pixel_values.shape[-1]), np.float32)
        grid_positions = np.zeros((len(grids), longest, 2), np.int32)
        starts = np.concatenate([[0], np.cumsum(counts)])
        for i, (_, height, width) in enumerate(grids.tolist()):
            pixels[i, : counts[i]] = pixel_values[starts[i] : starts[i + 1]]
            grid_positions[i, : counts[i]] = merge_order(height, width, self.spatial_merge_size)
        mask = np.arange(longest) < counts[:, None]
        return Images(pixels, mask, grid_positions, stride=longest // self.merge), (counts // self.merge).tolist()


#: Cosine and sine of the rotary angles.
Rope2d = tuple[Float[ArrayLike, "images patches head_dim"], Float[ArrayLike, "images patches head_dim"]]


class Attention(nnx.Module):
    def __init__(self, key: PRNGKeyArray, config: QwenVision):
        qkv, proj = jax.random.split(key)
        width = config.hidden_size
        self.heads = config.num_heads
        self.qkv = Linear(qkv, width, 3 * width, bias=True)
        self.proj = Linear(proj, width, width, bias=True)

    def __call__(
        self,
        x: Float[ArrayLike, "images patches width"],
        rope: Rope2d,
        mask: Bool[ArrayLike, "images patches patches"],
        probe: Probe,
        windows: Windows | None = None,
        in_windows: Bool[ArrayLike, ""] | bool = False,
    ) -> Float[Array, "images patches width"]:
        """Attention under ``mask``, or inside windows.

        Args:
            windows: of a large picture, if neither scores nor probabilities are looked at.
            in_windows: whether this block attends inside them; it then does not read ``mask``.
        """
        images, patches, _ = x.shape
        qkv = probe.linear("visual.attn.qkv", self.qkv, x).reshape(images, patches, 3, self.heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        q, k = rotate(q, *rope), rotate(k, *rope)
        if windows is None:
            out = attend(q, k, v, mask, probe, "visual")
        else:
            unseen = Probe((), NO_TAPS, probe.ctx)  # what a branch taps cannot leave it
            out = jax.lax.cond(
                in_windows,
                lambda: attend_in_windows(q, k, v, windows),
                lambda: attend(q, k, v, mask, unseen, "visual"),
            )
            out = probe("visual.head_out", out.reshape(v.shape)).reshape(out.shape)
        return probe.linear("visual.attn.proj", self.proj, out)


def merge_order(height: int, width: int, merge: int) -> Int[np.ndarray, "{height}*{width} 2"]:
    """Row and column of every patch, in the processor's order: one block of ``merge x merge`` patches after another."""
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    blocks = grid.reshape(height // merge, merge, width // merge, merge, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
