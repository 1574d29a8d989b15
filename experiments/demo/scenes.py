"""Renders the images of the demo: coloured glyphs on a patchy background, and often a sign with a number.

A scene depends only on its generator (`scene_generators`), so scene 7 does not depend on the number of scenes. The font
is DejaVu Sans of matplotlib.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

THEMES = {
    "weather": {"sun": "☀", "cloud": "☁", "umbrella": "☂", "snowman": "☃", "snowflake": "❄", "bolt": "⚡", "moon": "☾"},
    "office": {"phone": "☎", "envelope": "✉", "pencil": "✎", "keyboard": "⌨", "gear": "⚙", "plane": "✈", "cup": "☕"},
    "chess": {"king": "♚", "queen": "♛", "rook": "♜", "knight": "♞", "bishop": "♝", "pawn": "♟", "dice": "⚄"},
    "cards": {"heart": "♥", "flower": "✿", "star": "★", "note": "♫", "smiley": "☻", "diamond": "♦", "spade": "♠"},
    "harbour": {"anchor": "⚓", "flag": "⚑", "house": "⌂", "cross": "✚", "skull": "☠", "sword": "⚔", "balance": "⚖"},
}
THEME_PROBABILITIES = (0.30, 0.25, 0.20, 0.15, 0.10)
GLYPHS = {noun: glyph for theme in THEMES.values() for noun, glyph in theme.items()}
NOUNS = tuple(GLYPHS)

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 210),
    "yellow": (240, 210, 20),
    "orange": (255, 127, 14),
    "purple": (140, 60, 190),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "pink": (250, 120, 190),
    "brown": (120, 70, 30),
}
MIN_CONTRAST = 110  # summed absolute difference of a colour to the mean background

IN_THEME_PROBABILITY = 0.7
SIGN_PROBABILITY = 0.6
SIGN_SIZE = (59, 41)
DIGIT_CENTERS = ((19, 20), (39, 20))
GAP = 8  # smallest distance in px between two boxes
MARGIN = 2  # smallest distance in px between a box and the edge of the canvas
PLACEMENT_TRIES = 20
FULL_CANVAS = (336, 336)

Box = tuple[int, int, int, int]  # left, top, right, bottom in px, right and bottom exclusive


@dataclass(frozen=True)
class Density:
    """Range of the number of objects (inclusive), and possible lengths of their longer side in px."""

    n_objects: tuple[int, int]
    n_objects_small: tuple[int, int]  # on a canvas smaller than 336 x 336
    sizes: tuple[int, ...]


DENSITIES = {
    "sparse": Density((2, 8), (2, 8), (36, 44, 52, 60, 72, 84)),
    "crowded": Density((10, 14), (6, 10), (30, 36, 44)),
}


@dataclass(frozen=True)
class Object:
    noun: str
    color: str
    box: Box

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Sign:
    digits: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """Objects of a scene and their boxes. ``background`` [height, width, 3] uint8 is the image without objects."""

    density: str
    theme: str
    objects: tuple[Object, ...]
    sign: Sign | None
    background: np.ndarray = field(repr=False, compare=False)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in px."""
        return self.background.shape[1], self.background.shape[0]

    @property
    def nouns(self) -> tuple[str, ...]:
        return tuple(o.noun for o in self.objects)


def scene_generators(seed: int, index: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Two independent generators of scene ``index``: for the scene and for its questions."""
    scene, questions = np.random.default_rng([seed, index]).spawn(2)
    return scene, questions


def make_scene(
    rng: np.random.Generator,
    density: str = "crowded",
    canvas: tuple[int, int] = FULL_CANVAS,
    n_objects: tuple[int, int] | None = None,
    sizes: Sequence[int] | None = None,
) -> Scene:
    """Draw one scene of at least two objects.

    Parameters
    ----------
    rng : np.random.Generator
        Generator of this scene only.
    density : str
        ``sparse`` or ``crowded``. Defines the two ranges below if they are None, and the mix of questions.
    canvas : tuple of int
        Width and height in px.
    n_objects : tuple of int, optional
        Minimum and maximum number of objects. A noun that is already in the scene, or has no free place, is skipped.
    sizes : tuple of int, optional
        Lengths of an object's longer side in px.
    """
    preset = DENSITIES[density]
    fewest, most = n_objects or (preset.n_objects if min(canvas) >= min(FULL_CANVAS) else preset.n_objects_small)
    sizes = sizes or preset.sizes
    background = _background(rng, canvas)
    mean = background.reshape(-1, 3).mean(0)
    colors = [name for name, rgb in COLORS.items() if np.abs(mean - rgb).sum() > MIN_CONTRAST]
    theme = str(rng.choice(list(THEMES), p=THEME_PROBABILITIES))
    in_theme = tuple(THEMES[theme])

    while True:
        objects: list[Object] = []
        for _ in range(rng.integers(fewest, most + 1)):
            noun = str(rng.choice(in_theme if rng.random() < IN_THEME_PROBABILITY else NOUNS))
            if noun in (o.noun for o in objects):
                continue
            mask = glyph_mask(noun, int(rng.choice(sizes)))
            box = _place(rng, mask.size, canvas, [o.box for o in objects])
            if box:
                objects.append(Object(noun, str(rng.choice(colors)), box))
        if len(objects) >= 2:
            break

    sign = None
    if rng.random() < SIGN_PROBABILITY:
        box = _place(rng, SIGN_SIZE, canvas, [o.box for o in objects])
        if box:
            sign = Sign(str(rng.integers(10, 100)), box)
    return Scene(density, theme, tuple(objects), sign, background)


def render(scene: Scene) -> Image.Image:
    """RGB image of a scene."""
    image = Image.fromarray(scene.background)
    for thing in scene.objects:
        left, top, right, bottom = thing.box
        image.paste(COLORS[thing.color], (left, top), glyph_mask(thing.noun, max(right - left, bottom - top)))
    if scene.sign:
        image.paste(_sign(scene.sign.digits), scene.sign.box[:2])
    return image


@cache
def glyph_mask(noun: str, size: int) -> Image.Image:
    """Glyph of a noun as an 8-bit mask, cropped to its ink, with a longer side of ``size`` px."""
    large = Image.new("L", (400, 400))
    ImageDraw.Draw(large).text((200, 200), GLYPHS[noun], fill=255, font=_font(256), anchor="mm")
    ink = large.crop(large.getbbox())
    scale = size / max(ink.size)
    return ink.resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.LANCZOS)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def _background(rng: np.random.Generator, canvas: tuple[int, int]) -> np.ndarray:
    """Background [height, width, 3] uint8: a base colour, a coarse grid of offsets (bicubic), and grey noise."""
    width, height = canvas
    base = rng.integers(60, 200, 3)
    k = int(rng.choice([3, 6, 12]))
    grid = base + rng.integers(-45, 46, (k, k, 3))
    smooth = np.asarray(Image.fromarray(grid.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(-8, 9, (height, width, 1), dtype=np.int16)
    return (smooth + noise).clip(0, 255).astype(np.uint8)


def _place(rng: np.random.Generator, size: tuple[int, int], canvas: tuple[int, int], taken: list[Box]) -> Box | None:
    """A free place for a box of ``size``, at least GAP px from the ``taken`` boxes; None after several attempts."""
    for _ in range(PLACEMENT_TRIES):
        left, top = (
            int(rng.integers(MARGIN, room - side - MARGIN + 1)) for room, side in zip(canvas, size, strict=True)
        )
        box = (left, top, left + size[0], top + size[1])
        if all(
            box[2] + GAP <= other[0] or other[2] + GAP <= box[0] or box[3] + GAP <= other[1] or other[3] + GAP <= box[1]
            for other in taken
        ):
            return box
    return None


def _sign(digits: str) -> Image.Image:
    image = Image.new("RGB", SIGN_SIZE)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, SIGN_SIZE[0] - 1, SIGN_SIZE[1] - 1), fill=(245, 245, 235), outline=(30, 30, 30), width=2)
    for digit, center in zip(digits, DIGIT_CENTERS, strict=True):
        draw.text(center, digit, fill=(10, 10, 10), font=_font(30), anchor="mm")
    return image
