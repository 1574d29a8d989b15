"""Pages for the panels of one image and its questions, which open from disk or in a notebook."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

MAX_WIDTH = 800
"""Width of an image in a page, in pixels; a panel is 400 pixels wide."""
NOTHING = "(empty answer)"
"""Shown instead of an empty answer."""
POLICY = "default-src 'none'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
"""Content security policy: a page loads only its own content."""
HERE = Path(__file__).parent
DATA = '"__DATA__"'
"""Placeholder of the data in the template."""


def script() -> str:
    """Drawing code of the server's page, saved pages, the report and the Space."""
    return (HERE / "panels.js").read_text(encoding="utf-8")


def style() -> str:
    return (HERE / "panels.css").read_text(encoding="utf-8")


def template() -> str:
    """Template of a saved page, without data."""
    page = (HERE / "saved.html").read_text(encoding="utf-8")
    return page.replace("/*CSS*/", style()).replace("/*JS*/", script())


def embedded(data: Any) -> str:
    """JSON that is safe inside a script element: it cannot contain a tag or a comment."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def saved_page(view: dict[str, Any]) -> str:
    """HTML file that shows ``view``, see `experiments.explorer.views.show`, without a server or other files."""
    return template().replace(DATA, embedded(view))


@dataclass(frozen=True, repr=False)
class Frame:
    """A view in a notebook: the page in a frame, with interactive words, patches and slider.

    Attributes
    ----------
    view : dict
        See `experiments.explorer.views.show`.
    height : int
        Height in pixels.
    """

    view: dict[str, Any]
    height: int = 640

    def _repr_html_(self) -> str:
        page = saved_page(self.view).replace("&", "&amp;").replace("'", "&#39;")
        return f"<iframe srcdoc='{page}' style='width:100%;height:{self.height}px;border:0' title=Panels></iframe>"


def data_url(image: Image.Image, width: int = MAX_WIDTH) -> str:
    """JPEG of the image as a ``data:`` URL, at most ``width`` pixels wide. Boxes of a view are in pixels of the
    original.
    """
    out, small = io.BytesIO(), image.copy()
    small.thumbnail((width, 4 * width))
    small.save(out, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
