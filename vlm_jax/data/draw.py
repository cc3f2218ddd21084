"""Draws a scene as a 64x64 RGB picture. Position, size, font, tints, texture and noise are random."""

import functools
import math
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm_jax.data.scenes import SIZE, TALLEST, Arrangement, Chart, Emblem, Form, Glyphs, Scene, Signs
from vlm_jax.data.world import COLOUR_RGB

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif")
_FINE = 4  # emblems are drawn this much larger, then reduced, for smooth edges


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """A picture of ``scene``. The scene decides its contents, ``rng`` its appearance."""
    image = _background(rng)
    match scene:
        case Emblem(entity):
            _draw_emblem(image, entity.shape, entity.colour, rng)
        case Form(rows):
            _draw_form(image, rows, rng)
        case Chart(bars):
            _draw_chart(image, bars, rng)
        case Signs(signs):
            _draw_signs(image, signs, rng)
        case Glyphs(text):
            _draw_glyphs(image, text, rng)
        case Arrangement(things):
            for thing in things:
                _paint(image, thing.shape, (thing.x, thing.y), thing.radius, _turn(rng), _tint(thing.colour, rng))
    return _with_noise(image, rng)


def _background(rng: np.random.Generator) -> Image.Image:
    """Light paper: plain, shaded from one side to the other, or blotchy."""
    paper = np.broadcast_to(rng.uniform(222, 252, 3), (SIZE, SIZE, 3))
    style = rng.integers(3)
    if style == 1:
        angle, ramp = rng.uniform(0, 2 * math.pi), np.linspace(-1, 1, SIZE)
        shade = math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None]
        paper = paper + rng.uniform(4, 14) * shade[..., None]
    elif style == 2:
        grain = Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        paper = paper + rng.uniform(0.04, 0.12) * (np.asarray(grain, np.float32)[..., None] - 128)
    return Image.fromarray(np.clip(paper, 0, 255).astype(np.uint8))


def _with_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    noise = rng.standard_normal((SIZE, SIZE, 3), np.float32) * np.float32(rng.uniform(1, 6))
    return Image.fromarray(np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8))


def _tint(colour: str, rng: np.random.Generator) -> tuple[int, ...]:
    """The named colour with a small random change, as red, green and blue from 0 to 255."""
    return tuple(np.clip(np.add(COLOUR_RGB[colour], rng.integers(-14, 15, 3)), 0, 255).tolist())


def _ink(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(0, 70, 3).tolist())


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # for its fonts; it takes a moment to import

    return ImageFont.truetype(str(pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")), size)


def _fitting_font(texts: list[str], width: int, largest: int, rng: np.random.Generator) -> ImageFont.FreeTypeFont:
    """A random font in the largest size with which all ``texts`` fit in ``width``, or one or two sizes smaller."""
    name = FONTS[rng.integers(len(FONTS))]
    size = largest
    while size > 13 and max(_font(name, size).getlength(t) for t in texts) > width:
        size -= 1
    return _font(name, max(13, size - int(rng.integers(3))))


def _draw_emblem(image: Image.Image, shape: str, colour: str, rng: np.random.Generator) -> None:
    radius = rng.uniform(12, 22)
    centre = rng.uniform(radius + 1, SIZE - 1 - radius, 2)
    _paint(image, shape, centre, radius, _turn(rng), _tint(colour, rng))


def _turn(rng: np.random.Generator) -> float:
    """A small angle in radians, by which a shape is turned."""
    return rng.uniform(-0.2, 0.2)


def _paint(image: Image.Image, shape: str, centre, radius: float, turn: float, tint: tuple[int, ...]) -> None:
    """Paints a shape around ``centre``."""
    mask = Image.new("L", (SIZE * _FINE, SIZE * _FINE))
    pen = ImageDraw.Draw(mask)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])

    def to_pixels(points) -> np.ndarray:
        return (np.asarray(centre) + radius * np.asarray(points) @ rotation) * _FINE

    def disc(x: float, y: float, r: float, fill: int) -> None:
        middle, reach = to_pixels((x, y)), r * radius * _FINE
        pen.ellipse([*(middle - reach), *(middle + reach)], fill=fill)

    if shape in _OUTLINES:
        pen.polygon(to_pixels(_OUTLINES[shape]).ravel().tolist(), fill=255)
    else:
        disc(0, 0, 0.95, 255)
        if shape == "ring":
            disc(0, 0, 0.5, 0)
        elif shape == "crescent":
            disc(0.5, -0.1, 0.75, 0)
    image.paste(tint, (0, 0), mask.reduce(_FINE))


def _wheel(corners: int, *radii: float) -> list[tuple[float, float]]:
    """``corners`` points around the centre, starting at the top, with the given radii in turn."""
    turns = [2 * math.pi * i / corners for i in range(corners)]
    return [(radii[i % len(radii)] * math.sin(t), -radii[i % len(radii)] * math.cos(t)) for i, t in enumerate(turns)]


# fmt: off
_OUTLINES = {
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "triangle": [(0, -0.9), (0.9, 0.75), (-0.9, 0.75)],
    "star": _wheel(10, 1.0, 0.42),
    "cross": [(-0.3, -0.9), (0.3, -0.9), (0.3, -0.3), (0.9, -0.3), (0.9, 0.3), (0.3, 0.3),
              (0.3, 0.9), (-0.3, 0.9), (-0.3, 0.3), (-0.9, 0.3), (-0.9, -0.3), (-0.3, -0.3)],
    "diamond": [(0, -1), (0.58, 0), (0, 1), (-0.58, 0)],
}
# fmt: on


def _draw_form(image: Image.Image, rows, rng: np.random.Generator) -> None:
    gap = int(rng.integers(5, 8))
    font = _fitting_font([label + value for _, label, value in rows], SIZE - 4 - gap, 17, rng)
    reach = gap + max(font.getlength(label) for _, label, _ in rows)
    width = reach + max(font.getlength(value) for _, _, value in rows)
    left = 2 + rng.uniform(0, max(0, SIZE - 4 - width))
    first = 11 + rng.uniform(-1.5, 1.5)
    pen, ink, rule = ImageDraw.Draw(image), _ink(rng), tuple(rng.integers(165, 205, 3).tolist())
    for line in (1, 2):
        pen.line([1, first + 21 * line - 10.5, SIZE - 2, first + 21 * line - 10.5], fill=rule)
    for slot, label, value in rows:
        middle = first + 21 * slot + _baseline_offset(font)
        pen.text((left, middle), label, ink, font, anchor="ls")
        pen.text((left + reach, middle), value, ink, font, anchor="ls")


def _draw_chart(image: Image.Image, bars, rng: np.random.Generator) -> None:
    pen = ImageDraw.Draw(image)
    unit, base = 6.5, round(rng.uniform(57, 61))
    pitch = rng.uniform(13, 15)
    width = rng.uniform(0.6, 0.8) * pitch
    left = rng.uniform(2, SIZE - 2 - 3 * pitch - width)
    for level in range(1, TALLEST + 1):
        shade = 176 if level % 2 == 0 else 210
        pen.line([0, base - round(unit * level), SIZE, base - round(unit * level)], fill=(shade,) * 3)
    for slot, colour, height in bars:
        x = round(left + pitch * slot)
        pen.rectangle([x, base - round(unit * height), round(x + width), base], fill=_tint(colour, rng))
    pen.line([0, base, SIZE, base], fill=_ink(rng))


def _draw_signs(image: Image.Image, signs, rng: np.random.Generator) -> None:
    pen = ImageDraw.Draw(image)
    font = _fitting_font([word for *_, word in signs], 48, 18, rng)
    for slot, colour, word in signs:
        half = font.getlength(word) / 2 + rng.uniform(3, 6)
        x = rng.uniform(half + 1, SIZE - 2 - half)
        y = 10.8 + 20.7 * slot + rng.uniform(-0.6, 0.6)
        tint = _tint(colour, rng)
        pen.rounded_rectangle([x - half, y - 9.2, x + half, y + 9.2], radius=int(rng.integers(0, 5)), fill=tint)
        ink = (10, 10, 10) if np.dot(tint, (0.3, 0.59, 0.11)) > 120 else (250, 250, 250)
        pen.text((x, y + _baseline_offset(font)), word, ink, font, anchor="ms")


def _draw_glyphs(image: Image.Image, text: str, rng: np.random.Generator) -> None:
    largest = {1: 54, 2: 36, 3: 26}[len(text)]
    font = _fitting_font([text], SIZE - 4, int(rng.integers(largest // 2, largest + 1)), rng)
    left, top, right, bottom = font.getbbox(text, anchor="ls")
    x = rng.uniform(1 - left, max(2 - left, SIZE - 1 - right))
    y = rng.uniform(1 - top, SIZE - 1 - bottom)
    ImageDraw.Draw(image).text((x, y), text, _ink(rng), font, anchor="ls")


def _baseline_offset(font: ImageFont.FreeTypeFont) -> float:
    """The distance in pixels from the middle of the capitals down to the baseline."""
    return 0.365 * font.size
