"""Images that are decoded when they are read."""

import base64
import hashlib
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
from PIL import Image, ImageOps

from vlm_jax.errors import UserError


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
        try:
            with Image.open(io.BytesIO(self._files[index]())) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (IndexError, UserError):
            raise
        except FileNotFoundError as error:
            raise UserError(f"{self._where}: image {error.filename} does not exist: put it there") from None
        except Exception:  # broken bytes can make a decoder raise any error
            raise UserError(f"{self._where}: an image is broken or not an image: fetch the dataset again") from None

    def digest(self) -> str:
        """A SHA-256 digest of the files, by which equal images are recognised without decoding them."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(hashlib.sha256(file()).digest())
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
                files.append((folder / (name if "." in name else f"{name}.jpg")).read_bytes)
            else:
                files.append(partial(_decoded, element))
    return LazyImages(files, where)


def _embedded(cell: pa.Scalar) -> bytes:
    value = cell.as_py()
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def _decoded(cell: pa.Scalar) -> bytes:
    return base64.b64decode(cell.as_py())
