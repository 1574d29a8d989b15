"""One function opens every image: each kind of file is made here and looked at."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.images import open_image

RAMP = np.linspace(0, 4000, 64 * 64).reshape(64, 64)


def written(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (written(Image.fromarray(RAMP.astype(np.uint16))), "grey 0 to 4000"),
        (written(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "grey 0 to 4000"),
        (written(Image.fromarray(RAMP.astype(np.float32) - 2000), "TIFF"), "grey -2000 to 2000"),
        (written(Image.fromarray((RAMP / 4000).astype(np.float32)), "TIFF"), "grey 0 to 1"),
    ],
)
def test_more_than_8_bits_keep_their_shades(content, note):
    image = open_image(content)
    grey = np.asarray(image, dtype=int)[..., 0]
    assert image.mode == "RGB" and image.info["note"] == f"{note} shown as black to white"
    assert np.abs(grey - RAMP / 4000 * 255).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_put_on_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 255))
    options = {"transparency": 0} if mode == "P" else {}
    if mode == "P":
        palette = Image.new("P", (4, 4), 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.putpixel((1, 1), 1)
        image = palette
    opened = open_image(written(image.convert(mode), **options))
    assert opened.getpixel((0, 0)) == (255, 255, 255) and opened.getpixel((1, 1)) == (0, 0, 0)
    assert opened.info["note"] == "transparency on white"


def test_an_opaque_alpha_and_plain_files_need_no_note():
    for image, kind in ((Image.new("RGBA", (4, 4), (9, 9, 9, 255)), "PNG"), (Image.new("CMYK", (4, 4)), "JPEG")):
        opened = open_image(written(image, kind))
        assert opened.mode == "RGB" and opened.info == {}


def test_images_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(written(Image.new("RGB", (40, 20)), "JPEG", exif=exif))
    assert open_image(tmp_path / "a.jpg").size == (20, 40)


def test_animated_files_show_their_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    opened = open_image(written(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert opened.getpixel((0, 0)) == (255, 0, 0) and opened.info["note"] == "first of 3 frames"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_short_is_refused(kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    content = written(Image.fromarray(noise), kind)
    with pytest.raises(ValueError, match=r"photo cannot be decoded: ") as error:
        open_image(content[: len(content) // 2], "photo")
    assert "0x" not in str(error.value)


def test_what_is_no_image_is_named_without_an_address(tmp_path):
    with pytest.raises(ValueError, match=r"^photo cannot be decoded: it is no image$"):
        open_image(b"milk, bread", "photo")
    Path(tmp_path / "notes.jpg").write_text("milk, bread", encoding="utf-8")
    with pytest.raises(ValueError, match=r"notes.jpg cannot be decoded: it is no image$"):
        open_image(tmp_path / "notes.jpg")


@pytest.mark.parametrize(("size", "is_read"), [((1, 5000), False), ((20000, 10), False), ((1000, 1), True)])
def test_a_strip_that_would_fill_the_memory_is_refused(size, is_read):
    content = written(Image.new("RGB", size))
    if is_read:
        assert open_image(content).size == size
        return
    with pytest.raises(ValueError, match=rf"strip cannot be decoded: {size[0]} x {size[1]} is thinner than 1 to 1000"):
        open_image(content, "strip")
