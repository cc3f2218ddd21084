"""One reader for the images of files, of datasets' cells, and of lmms-eval."""

import base64
import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm_jax.errors import UserError
from vlm_jax.files import is_url

T = TypeVar("T")
#: The largest grey of 12 bits.
_TWELVE_BITS = 4095


def as_rgb(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it, in RGB with 8 bits a channel.

    It is turned upright as its EXIF data say, and what is transparent becomes white. 16-bit greys are divided by 257.
    Of an animation, it is the first frame.

    Raises:
        UserError: for greys whose range is not known: floating point numbers and integers of 32 bits.

    Warns:
        UserWarning: for 16-bit greys that are all below 4,096: they may have been meant as 12 bits.
    """
    of_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    image = ImageOps.exif_transpose(image)
    if of_16_bits:
        greys = np.asarray(image)
        if greys.max() <= _TWELVE_BITS:
            warnings.warn(
                f"an image with 16 bits a channel uses only values up to {greys.max()}, so it is dark: if it has 12 "
                "bits or fewer, scale it to 16",
                stacklevel=2,
            )
        image = Image.fromarray(np.round(greys / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "whole numbers of 32 bits" if image.mode == "I" else "floating point numbers"
        raise UserError(f"the image's greys are {kind}, whose range is not known: save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decoded(file: bytes) -> Image.Image:
    """The image in a file's bytes, as :func:`as_rgb` shows it.

    Raises:
        UserError: if it cannot be decoded, with the decoder's reason.
    """
    try:
        with Image.open(io.BytesIO(file)) as image:
            return as_rgb(image)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError("this is no image in a format that Pillow reads: save it as PNG or JPEG") from None
    except Exception as error:  # broken bytes can make a decoder raise any error
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"the image cannot be decoded ({reason}): replace it with a whole PNG or JPEG") from None


def located(folder: Path, name: str) -> Path:
    """The path of an image that is named in a file of this folder.

    Raises:
        UserError: for a URL.
    """
    if is_url(name):
        raise UserError(f"the image {name[:200]} is a URL: download it, and name the file")
    return folder / name


def read_file(path: Path) -> bytes:
    """The bytes of a regular file.

    Raises:
        UserError: if there is none, such as at the path of a folder or a named pipe, or if it cannot be read.
    """
    try:
        if path.is_file():
            return path.read_bytes()
        reason = "is not a regular file" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:  # a name that is too long, or has a null character
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
    raise UserError(f"{str(path)[:200]} {reason}: put the image there")


class LazyImages(Sequence[Image.Image]):
    """The images of an example. Each access reads the file's bytes and decodes them to RGB, so nothing is kept.

    Args:
        files: a function for each image that returns its file's bytes.
        where: the example's id, for error messages.
    """

    def __init__(self, files: Sequence[Callable[[], bytes]], where: str):
        self._files, self._where = tuple(files), where

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return LazyImages(self._files[index], self._where)
        return self._named(index, lambda: decoded(self._files[index]()))

    def _named(self, index: int, read: Callable[[], T]) -> T:
        try:
            return read()
        except UserError as error:
            raise UserError(f"{self._where}, image {index % len(self) + 1}: {error}") from None

    def digest(self) -> str:
        """A SHA-256 digest of the files, by which equal images are recognised without decoding them."""
        digest = hashlib.sha256()
        for index, file in enumerate(self._files):
            digest.update(hashlib.sha256(self._named(index, file)).digest())
        return digest.hexdigest()


def lazy_images(cells: Sequence[pa.Scalar], folder: Path | None, where: str) -> LazyImages:
    """The images of a row, from its image columns' cells.

    A cell is an embedded image, a list of them, a file name in ``folder``, or (without a folder) base64.
    """
    files: list[Callable[[], bytes]] = []
    for cell in cells:
        if not cell.is_valid:
            continue
        elements = list(cell) if pa.types.is_list(cell.type) or pa.types.is_large_list(cell.type) else [cell]
        for element in (e for e in elements if e.is_valid):
            if pa.types.is_struct(element.type):
                files.append(partial(_embedded, element))
            elif folder is not None:
                name = str(element.as_py())
                # Some annotations give a number in place of the file's name.
                files.append(partial(_named_file, folder, name if "." in name else f"{name}.jpg"))
            else:
                files.append(partial(_from_base64, element))
    return LazyImages(files, where)


def _named_file(folder: Path, name: str) -> bytes:
    return read_file(located(folder, name))


def _embedded(cell: pa.Scalar) -> bytes:
    value = cell.as_py()
    if value.get("bytes") is not None:
        return value["bytes"]
    if value.get("path") is None:
        raise UserError("the cell holds neither bytes nor a path: write one of them")
    return read_file(Path(value["path"]))


def _from_base64(cell: pa.Scalar) -> bytes:
    try:
        return base64.b64decode(cell.as_py(), validate=False)
    except ValueError as error:
        raise UserError(f"the image is not base64 ({error}): write the file's bytes as base64") from None
