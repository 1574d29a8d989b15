"""Data of one question and one image for `panels.js`, and a page of it that opens from disk."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

MAX_WIDTH = 800
"""Of an image in a page, in pixels; a panel is 400 pixels wide."""
NOTHING = "(the model said nothing)"
"""In place of an empty answer."""
POLICY = "default-src 'none'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
"""What a page may load: nothing but what is in it."""
HERE = Path(__file__).parent
DATA = '"__DATA__"'
"""Stands in the template for what is drawn."""


def script() -> str:
    """The drawing code, shared by the server's page, saved pages, the report and the Space."""
    return (HERE / "panels.js").read_text(encoding="utf-8")


def style() -> str:
    return (HERE / "panels.css").read_text(encoding="utf-8")


def template() -> str:
    """A saved page without its data."""
    page = (HERE / "saved.html").read_text(encoding="utf-8")
    return page.replace("/*CSS*/", style()).replace("/*JS*/", script())


def embedded(data: Any) -> str:
    """JSON that may stand inside a script element: no tag and no comment can begin in it."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def saved_page(view: dict[str, Any]) -> str:
    """One HTML file that shows ``view``, see `experiments.explorer.views.show`, without a server or another file."""
    return template().replace(DATA, embedded(view))


@dataclass(frozen=True, repr=False)
class Frame:
    """A view in a notebook cell: the page in a frame, with interactive words, patches and slider.

    Attributes
    ----------
    view : dict
        See `experiments.explorer.views.show`.
    height : int
        In pixels.
    """

    view: dict[str, Any]
    height: int = 640

    def _repr_html_(self) -> str:
        page = saved_page(self.view).replace("&", "&amp;").replace("'", "&#39;")
        return f"<iframe srcdoc='{page}' style='width:100%;height:{self.height}px;border:0' title=Panels></iframe>"


def data_url(image: Image.Image, width: int = MAX_WIDTH) -> str:
    """A JPEG of the image, no wider than ``width`` pixels; the boxes of a view are in those of the image itself."""
    out, small = io.BytesIO(), image.copy()
    small.thumbnail((width, 4 * width))
    small.save(out, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
