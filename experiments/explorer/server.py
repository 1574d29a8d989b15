"""Serves the explorer on this machine only: loopback, no access to files, no data of visitors on disk."""

import asyncio
import base64
import binascii
import hashlib
import io
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from experiments.explorer import panels
from experiments.explorer.core import Cancelled, Explorer, read_keep, read_value
from experiments.explorer.views import Cell
from mipruner.errors import InputError, ModelError

MAX_BYTES = 20 * 2**20
MAX_MEGAPIXELS = 24
MAX_SIDE = 1344
"""Largest side of an image in pixels; larger images are resized."""
MAX_QUESTION = 500
MAX_PRUNERS, MAX_BUDGETS, MAX_WAITING = 8, 6, 32
MAX_SECONDS = 300
"""Time limit in seconds of one request, without waiting in the queue."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
HOSTS = ("127.0.0.1", "localhost", "[::1]")
FILES = {"page.js": "text/javascript", "panels.js": "text/javascript", "page.css": "text/css", "panels.css": "text/css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; script-src 'self'; "
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """An error with the HTTP status of its reply."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


# -------------------------------------------------------------------------------------------------------------- request


def read_image(source: str) -> tuple[Image.Image, str]:
    """Upright RGB image with sides of at most `MAX_SIDE` pixels, from a ``data:`` URL, and a name for it.

    Raises
    ------
    InputError
        If it is not an image, or has more than `MAX_MEGAPIXELS`.
    """
    try:
        raw = base64.b64decode(source.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("the image does not come as a base64 data URL") from error
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_MEGAPIXELS * 1e6:
                raise InputError(
                    f"the image has {opened.width} x {opened.height} pixels: at most {MAX_MEGAPIXELS} megapixels"
                )
            opened.draft("RGB", (MAX_SIDE, MAX_SIDE))  # a large JPEG is decoded at a smaller size
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError("the file cannot be read as an image: give a PNG, JPEG, WebP, BMP or GIF file") from error
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image, hashlib.sha256(raw).hexdigest()


@dataclass(frozen=True)
class Asked:
    """A parsed and checked request."""

    model: str
    image: Image.Image
    key: str
    questions: list[str]
    cells: list[Cell]
    scene: int | None


def read_list(asked: dict[str, Any], name: str, most: int) -> list[str]:
    """Check a list of one to ``most`` strings."""
    values = asked.get(name)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{name} is not a list of texts")
    if not 1 <= len(values) <= most:
        raise InputError(f"{len(values)} {name}: give 1 to {most}")
    return list(dict.fromkeys(values))


def read_cells(explorer: Explorer, asked: dict[str, Any]) -> list[Cell]:
    """Panels of every pruner at every budget."""
    keeps = [read_keep(text) for text in read_list(asked, "budgets", MAX_BUDGETS)]
    pruners = asked.get("pruners")
    if not isinstance(pruners, dict) or not all(isinstance(options, dict) for options in pruners.values()):
        raise InputError("pruners is not a table of names and hyperparameters")
    if not 1 <= len(pruners) <= MAX_PRUNERS:
        raise InputError(f"{len(pruners)} pruners: choose 1 to {MAX_PRUNERS}")
    cells = []
    for name, options in pruners.items():
        values = {key: read_value(str(value)[:100]) for key, value in options.items()}
        cells += [explorer.cell(name, keep, values, asked.get("model")) for keep in keeps]
    return cells


def read_request(explorer: Explorer, asked: Any) -> Asked:
    """Parse a request. Raises `InputError` if it is invalid."""
    if not isinstance(asked, dict):
        raise InputError("the request is not a table")
    questions = read_list(asked, "questions", 2)
    if any(len(question) > MAX_QUESTION for question in questions):
        raise InputError(f"a question has at most {MAX_QUESTION} characters")
    if any(not question.strip() for question in questions):
        raise InputError("the question is empty: type one")
    cells, scene = read_cells(explorer, asked), asked.get("scene")
    if isinstance(scene, int) and not isinstance(scene, bool):
        image, key = explorer.scene_image(scene), f"scene {scene}"
    elif isinstance(asked.get("image"), str):
        scene, (image, key) = None, read_image(asked["image"])
    else:
        raise InputError("there is no image: choose one")
    return Asked(str(asked.get("model")), image, key, questions, cells, scene)


async def read_body(request: Request) -> Any:
    """JSON of a request. A body that is too long is refused before it has arrived completely."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "only application/json is read here")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES * 4 // 3 + 2**16:  # base64
            raise Refused(413, f"the image is larger than {MAX_BYTES >> 20} MiB")
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise InputError("the request is not JSON") from error


# ---------------------------------------------------------------------------------------------------------------- queue


class Queue:
    """Serves one visitor at a time, in order of arrival."""

    def __init__(self) -> None:
        self._line: list[object] = []

    def place(self, ticket: object) -> int:
        """Number of visitors before the holder of the ticket."""
        return self._line.index(ticket)

    @asynccontextmanager
    async def ticket(self) -> AsyncIterator[object]:
        if len(self._line) >= MAX_WAITING:
            raise InputError(f"{MAX_WAITING} visitors are waiting already: try again later")
        ticket = object()
        self._line.append(ticket)
        try:
            yield ticket
        finally:
            self._line.remove(ticket)


@dataclass
class Work:
    """A request in its own thread. It stops before the next panel if the client no longer waits."""

    started: float
    progress: tuple[int, int] = (0, 0)
    is_cancelled: bool = False

    def tell(self, done: int, n: int) -> None:
        if self.is_cancelled:
            raise Cancelled
        if time.monotonic() - self.started > MAX_SECONDS:
            raise InputError(f"this took more than {MAX_SECONDS} s: ask for fewer panels")
        self.progress = done, n


async def follow(explorer: Explorer, queue: Queue, asked: Asked, is_gone: Callable[[], Any]) -> AsyncIterator[dict]:
    """Events of a request: place in the queue, finished panels, and finally the view or an error."""
    async with queue.ticket() as ticket:
        told: int | tuple[int, int] | None = None
        while place := queue.place(ticket):
            if place != told:
                yield {"place": place}
                told = place
            await asyncio.sleep(0.1)
            if await is_gone():
                return
        work = Work(time.monotonic())
        running = asyncio.create_task(
            run_in_threadpool(
                explorer.ask,
                asked.model,
                asked.image,
                asked.key,
                asked.questions,
                asked.cells,
                scene=asked.scene,
                tell=work.tell,
            )
        )
        try:
            while not (await asyncio.wait([running], timeout=0.1))[0]:
                if work.progress != told:
                    told = done, n = work.progress
                    yield {"done": done, "n": n}
                if await is_gone():
                    return
            yield {"view": running.result()}
        finally:
            work.is_cancelled = True
            if not running.done():
                with suppress(Cancelled, InputError, ModelError):
                    await asyncio.shield(running)  # the next visitor waits until the model is free


# ------------------------------------------------------------------------------------------------------------------ app


class Guard:
    """Refuses requests for another host (DNS rebinding) or from pages of other sites, and adds `HEADERS`."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if name not in HOSTS or (origin is not None and origin != f"http://{host}"):
            response = JSONResponse({"error": "this page answers only its own machine"}, 403)
            return await response(scope, receive, with_headers)
        await self.app(scope, receive, with_headers)


def application(explorer: Explorer) -> ASGIApp:
    """ASGI application with the page of an explorer."""
    queue = Queue()

    async def ask(request: Request) -> Response:
        try:
            content = await read_body(request)
            asked = await run_in_threadpool(read_request, explorer, content)
        except Refused as error:
            return JSONResponse({"error": str(error)}, error.status, {"Connection": "close"})
        except InputError as error:
            return JSONResponse({"error": str(error)}, 400)

        async def lines() -> AsyncIterator[str]:
            try:
                async for said in follow(explorer, queue, asked, request.is_disconnected):
                    yield json.dumps(said) + "\n"
            except (InputError, ModelError) as error:
                yield json.dumps({"error": str(error)}) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def scene(request: Request) -> Response:
        try:
            return JSONResponse(await run_in_threadpool(explorer.scene, request.path_params["index"]))
        except InputError as error:
            return JSONResponse({"error": str(error)}, 404)

    async def offer(request: Request) -> Response:
        return JSONResponse(explorer.describe() | {"max_bytes": MAX_BYTES, "waiting": len(queue._line)})

    def static(name: str, kind: str) -> Route:
        async def send(request: Request) -> Response:
            return Response((panels.HERE / name).read_bytes(), media_type=kind)

        return Route("/" if name == "page.html" else f"/{name}", send)

    async def saved(request: Request) -> Response:
        return Response(panels.template(), media_type="text/plain")  # never run in this origin

    routes = [
        static("page.html", "text/html"),
        *(static(name, kind) for name, kind in FILES.items()),
        Route("/saved.html", saved),
        Route("/offer", offer),
        Route("/scene/{index:int}", scene),
        Route("/ask", ask, methods=["POST"]),
    ]

    async def not_here(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "there is nothing here"}, getattr(error, "status_code", 404))

    async def broken(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "this went wrong on our side; the server's console says how"}, 500)

    return Guard(Starlette(routes=routes, exception_handlers={404: not_here, 405: not_here, 500: broken}))
