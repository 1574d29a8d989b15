"""See what pruners keep of an image, in the browser.

python -m experiments.explorer                            # the demo, http://127.0.0.1:8765
python -m experiments.explorer model=llava15_7b           # any model, by the words of run.py
python -m experiments.explorer models=[qwen3vl_4b,qwen3vl_8b] port=9000
"""

import socket
import sys
from collections.abc import Sequence

import uvicorn

from experiments.benchmarks.base import BenchmarkError
from experiments.explorer.core import Explorer
from experiments.explorer.server import application
from mipruner.errors import InputError, ModelError

PORT = 8765


def listen(port: int) -> socket.socket:
    """A socket on loopback; port 0 is any free one. Raises `InputError` if the port is taken."""
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(("127.0.0.1", port))
        opened.listen()  # who comes before the server runs waits
    except (OSError, OverflowError) as error:
        opened.close()
        raise InputError(f"port {port} cannot be had ({error}): give another, port=0 for any free one") from error
    return opened


def serve(explorer: Explorer, port: int) -> None:
    """Answer until interrupted, with the first model loaded before the address is printed."""
    opened = listen(port)
    print(f"loading {explorer.models[0]} ...", flush=True)
    explorer.adapter(explorer.models[0])
    server = uvicorn.Server(uvicorn.Config(application(explorer), log_level="warning", timeout_graceful_shutdown=2))
    print(f"http://127.0.0.1:{opened.getsockname()[1]}   (Ctrl-C ends it)", flush=True)
    server.run(sockets=[opened])


def read_words(words: Sequence[str]) -> tuple[list[str], list[str], int]:
    """Words of run.py, models and the port. Raises `InputError`."""
    own = {key: value for key, _, value in (word.partition("=") for word in words) if key in ("models", "port")}
    if not own.get("port", "0").isdecimal():
        raise InputError(f"port={own['port']} is not a number")
    models = [name.strip() for name in own.get("models", "").strip("[]").split(",") if name.strip()]
    others = [word for word in words if word.partition("=")[0] not in ("models", "port")]
    return others, models, int(own.get("port", PORT))


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(__doc__)
    try:
        overrides, models, port = read_words(sys.argv[1:])
        serve(Explorer(overrides, models), port)
    except (InputError, ModelError, BenchmarkError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        pass
