"""Shows kept tokens and answers in the browser.

python run.py task=explorer                                # the demo, http://127.0.0.1:8765
python run.py task=explorer model=llava15_7b               # any model, by the words of every other run
python run.py task=explorer models=[qwen3vl_4b,qwen3vl_8b] port=9000
"""

import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import uvicorn

from experiments.explorer.core import Explorer
from experiments.explorer.server import application
from mipruner.errors import InputError


def listen(port: int) -> socket.socket:
    """Open a socket on loopback; port 0 is any free port. Raises `InputError` if the port is not available."""
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(("127.0.0.1", port))
        opened.listen()  # earlier connections wait
    except (OSError, OverflowError, TypeError) as error:
        opened.close()
        raise InputError(f"port={port} is not available ({error}): give another, port=0 for any free one") from error
    return opened


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    """Serve until interrupted. The first model is loaded before the address is printed."""
    opened = listen(config["port"])
    explorer = Explorer(overrides, config["models"] or ())
    explorer.adapter(explorer.models[0])
    server = uvicorn.Server(uvicorn.Config(application(explorer), log_level="warning", timeout_graceful_shutdown=2))
    print(f"http://127.0.0.1:{opened.getsockname()[1]}   (Ctrl-C ends it)", flush=True)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[opened])
