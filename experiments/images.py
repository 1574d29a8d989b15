"""Opens images of benchmarks and of the command line as upright 8-bit RGB, and reports lossy conversions.

docs/own_data.md lists the conversion of each kind of file. ``image.info["note"]`` describes a lossy conversion.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

WHITE = (255, 255, 255, 255)
MAX_RATIO = 1000
"""Limit of the long side over the short one. CLIP's processor enlarges the short side to 336 px and crops afterwards:
1 x 5000 px take 5 GiB."""


def open_image(source: Path | bytes, name: str = "") -> Image.Image:
    """Open an image as RGB [height, width]. Animated files give their first frame.

    Parameters
    ----------
    source : Path or bytes
        A file or its content.
    name : str
        Name of the image in errors; by default its path.

    Raises
    ------
    ValueError
        If it is not an image, is truncated, is larger than Pillow's limit, or thinner than `MAX_RATIO`.
    """
    label = name or ("an image" if isinstance(source, bytes) else str(source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                if max(image.size) > MAX_RATIO * min(image.size):
                    width, height = image.size
                    raise ValueError(f"{width} x {height} is thinner than 1 to {MAX_RATIO}: cut it into parts")
                n_frames = getattr(image, "n_frames", 1)
                image.load()
                upright = ImageOps.exif_transpose(image)
                rgb, note = to_rgb(upright)
    except UnidentifiedImageError:
        raise ValueError(f"{label} cannot be decoded: it is no image") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{label} cannot be decoded: {error}") from error
    notes = [note] if note else []
    if n_frames > 1 and image.format != "MPO":  # further frames of an MPO are a preview or a stereo image
        notes.append(f"first of {n_frames} frames")
    rgb.info = {"note": ", ".join(notes)} if notes else {}
    return rgb


def to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """The image in RGB, and a note if the conversion is lossy."""
    if image.mode[0] in "IF":
        return scaled(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if any(rgba.getchannel("A").histogram()[:255]):
            white = Image.new("RGBA", image.size, WHITE)
            return Image.alpha_composite(white, rgba).convert("RGB"), "transparency on white"
        return rgba.convert("RGB"), ""
    return image.convert("RGB"), ""


def scaled(image: Image.Image) -> tuple[Image.Image, str]:
    """Scale a grey image of more than 8 bits: the smallest value to black, the largest to white.

    Values in 0..255 are not changed. Floats in 0..1 are shares of white.
    """
    values = np.asarray(image, dtype=np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    values = np.where(finite, values, low)
    grey = np.round((values - low) / ((high - low) or 1) * 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB"), f"grey {low:g} to {high:g} shown as black to white"
