"""Every way in which an image enters gives the same pixels: those that a viewer shows."""

import base64
import io
import json
import os

import jax
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from transformers.image_utils import load_image

from vlm_jax.data import Example, load_task
from vlm_jax.data.images import as_rgb, decoded, lazy_images, read_file
from vlm_jax.errors import UserError
from vlm_jax.prompts import encode
from vlm_jax.runs.options import ModelOptions

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (48, 96, 3), dtype=np.uint8)


def saved(image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, options.pop("format", "PNG"), **options)
    return file.getvalue()


def turned(orientation, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(NOISE), exif=exif, **options)


def ways(file: bytes, folder) -> list[np.ndarray]:
    """The pixels of a file by each way in which one can enter."""
    (folder / "a.bin").write_bytes(file)
    (folder / "mine.jsonl").write_text(json.dumps({"id": "a", "image": "a.bin", "question": "What?", "answers": ["x"]}))
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [
        (pa.scalar({"bytes": file, "path": None}, struct), None),
        (pa.scalar({"bytes": None, "path": str(folder / "a.bin")}, struct), None),
        (pa.scalar("a.bin"), folder),
        (pa.scalar(base64.b64encode(file).decode()), None),
    ]
    images = [lazy_images([cell], where, "here")[0] for cell, where in cells]
    images += [load_task(folder / "mine.jsonl")[0].images[0], as_rgb(Image.open(io.BytesIO(file)))]
    assert {image.mode for image in images} == {"RGB"}
    return [np.asarray(image) for image in images]


@pytest.mark.parametrize("options", [{}, {"format": "JPEG", "quality": 95}], ids=["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_as_in_transformers(tmp_path, orientation, options):
    file = turned(orientation, **options)
    (tmp_path / "picture").write_bytes(file)
    expected = np.asarray(load_image(str(tmp_path / "picture")))
    assert expected.shape[:2] == ((96, 48) if orientation > 4 else (48, 96))
    for pixels in ways(file, tmp_path):
        np.testing.assert_array_equal(pixels, expected)
    if orientation > 1:  # the control: without the orientation it is another picture
        assert not np.array_equal(expected, np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB", "YCbCr"])
def test_other_modes_are_converted_as_in_transformers(tmp_path, mode):
    options = {"format": "TIFF"} if mode in ("CMYK", "YCbCr") else {}
    file = saved(Image.fromarray(NOISE).convert(mode), **options)
    (tmp_path / "picture").write_bytes(file)
    for pixels in ways(file, tmp_path):
        np.testing.assert_array_equal(pixels, np.asarray(load_image(str(tmp_path / "picture"))))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_greys_of_16_bits_are_scaled(tmp_path, format):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    expected = np.round(ramp / 257).astype(np.uint8)
    for pixels in ways(saved(Image.fromarray(ramp), format=format), tmp_path):
        for channel in range(3):
            np.testing.assert_array_equal(pixels[..., channel], expected)
    assert (np.asarray(Image.fromarray(ramp).convert("RGB")) == 255).mean() > 0.9  # what Pillow alone would show


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """The colour behind full transparency never shows."""
    alpha = np.zeros((48, 96), np.uint8)
    alpha[:, :48] = 255
    if mode == "P":
        image = Image.fromarray((alpha > 0).astype(np.uint8)).convert("P")
        image.putpalette([200, 0, 0, 0, 0, 200] + [0] * 750)
        file, shown = saved(image, transparency=0), (0, 0, 200)
    else:
        layers = [np.full((48, 96), 90, np.uint8)] * (len(mode) - 1)
        file, shown = saved(Image.fromarray(np.dstack([*layers, alpha]), mode)), (90, 90, 90)
    for pixels in ways(file, tmp_path):
        assert (pixels[:, :48] == shown).all() and (pixels[:, 48:] == 255).all()


def test_half_transparency_is_mixed_with_white():
    image = Image.new("RGBA", (4, 4), (0, 100, 200, 128))
    pixels = np.asarray(as_rgb(image), float)
    expected = 255 + (np.array([0, 100, 200]) - 255) * 128 / 255
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), atol=1)


@pytest.mark.parametrize(
    "array, says",
    [
        (np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), "greys are floating point numbers"),
        (np.full((8, 8), 70_000, np.int32), "greys are whole numbers of 32 bits"),
        (np.full((8, 8), 200, np.int32), "greys are whole numbers of 32 bits"),
    ],
)
def test_greys_of_unknown_range_are_refused(array, says):
    with pytest.raises(UserError, match=says):
        decoded(saved(Image.fromarray(array), format="TIFF"))


def test_the_decoders_reason_is_told(monkeypatch):
    whole = saved(Image.fromarray(NOISE))
    with pytest.raises(UserError, match=r"cannot be decoded \(.*truncated"):
        decoded(whole[:-2000])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"cannot be decoded \(.*decompression bomb"):
        decoded(whole)


def test_only_regular_files_are_read(tmp_path):
    """A named pipe would be waited for without end."""
    os.mkfifo(tmp_path / "pipe.png")
    for path, says in [
        (tmp_path / "pipe.png", "is not a regular file"),
        (tmp_path, "is not a regular file"),
        (tmp_path / "none.png", "does not exist"),
        (tmp_path / ("x" * 300), "cannot be read .File name too long"),
        (tmp_path / "a\0b", "does not exist"),
    ]:
        with pytest.raises(UserError, match=says):
            read_file(path)


@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_damaged_files_give_a_sentence_or_a_picture(count):
    """Random changes of valid files: never another error than ours."""
    rng, refused = np.random.default_rng(1), 0
    whole = [turned(6), turned(3, format="JPEG"), saved(Image.fromarray(NOISE).convert("P"), format="GIF")]
    whole += [saved(Image.fromarray(NOISE), format=name) for name in ("BMP", "WEBP", "TIFF")]
    for number in range(count):
        file = bytearray(whole[number % len(whole)])
        for _ in range(int(rng.integers(1, 6))):
            match rng.integers(3):
                case 0:
                    file[rng.integers(len(file))] = rng.integers(256)
                case 1:
                    del file[rng.integers(len(file)) :]
                case 2:
                    at = int(rng.integers(len(file) + 1))
                    file[at:at] = rng.bytes(int(rng.integers(1, 9)))
            if not file:
                break
        try:
            assert decoded(bytes(file)).mode == "RGB"
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > count / 10


@pytest.mark.parametrize("how", ["transparent", "16 bits", "turned", "palette"])
def test_images_that_a_program_gives(how):
    """They reach the model as they would from a file."""
    clear = Image.fromarray(NOISE).convert("RGBA")
    clear.putalpha(0)
    ramp = np.linspace(0, 65535, 48 * 96).reshape(48, 96).astype(np.uint16)
    image = {
        "transparent": clear,
        "16 bits": Image.fromarray(ramp),
        "turned": Image.open(io.BytesIO(turned(6))),
        "palette": Image.fromarray(NOISE).convert("P"),
    }[how]
    config, processor = ModelOptions().load_processor()

    def pixels(image):
        return encode([Example("a", (image,), "What?", ("x",))], processor, config).inputs.images

    want = pixels(as_rgb(image))
    assert all(map(np.array_equal, jax.tree.leaves(pixels(image)), jax.tree.leaves(want)))
    if how != "palette":  # the control: converted without care, it is another picture
        other = pixels(Image.fromarray(np.asarray(image.convert("RGB"))))
        assert not all(map(np.array_equal, jax.tree.leaves(other), jax.tree.leaves(want)))


def test_an_image_that_is_none():
    config, processor = ModelOptions().load_processor()
    with pytest.raises(
        UserError, match=r"example 'a', image 1 cannot be shown \('numpy.ndarray' object.*give a whole Pillow image"
    ):
        encode([Example("a", (NOISE,), "What?", ("x",))], processor, config)
    grey = Image.fromarray(np.zeros((8, 8), np.float32))
    cut = Image.open(io.BytesIO(saved(Image.fromarray(NOISE))[:2000]))
    closed = Image.open(io.BytesIO(saved(Image.fromarray(NOISE))))
    closed.close()
    says = {
        "floating point numbers": grey,
        "truncated": cut,
        "closed": closed,
        "has no pixels": Image.new("RGB", (0, 5)),
    }
    for reason, image in says.items():
        with pytest.raises(UserError, match=f"example 'a', image 1.*{reason}"):
            encode([Example("a", (image,), "What?", ("x",))], processor, config)


def test_dark_greys_of_16_bits_are_told():
    dark = Image.fromarray(np.full((8, 8), 4095, np.uint16))
    with pytest.warns(UserWarning, match="uses only values up to 4095"):
        as_rgb(dark)
