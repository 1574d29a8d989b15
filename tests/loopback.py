"""A judge on this machine: a real HTTP server that answers as chat/completions does, or does not."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def server(reply: Callable[[dict, int], tuple[int, object]]) -> Iterator[tuple[str, list[dict]]]:
    """Its base_url, and what was asked so far. ``reply`` maps a request and how many came before it to a status and a
    text, or raw bytes."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            number = len(asked)
            asked.append(request | {"key": self.headers["Authorization"], "path": self.path})
            status, content = reply(request, number)
            kind = "application/json"
            if isinstance(content, bytes):
                kind = "text/html"
            elif status == 200:
                message = {"role": "assistant", "content": content}
                body = {"id": "1", "object": "chat.completion", "created": 1, "model": f"{request['model']}-0613"}
                body["usage"] = {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
                content = json.dumps(body | {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
            else:
                content = json.dumps({"error": {"message": content}})
            content = content if isinstance(content, bytes) else content.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            if status in (429, 500):
                self.send_header("retry-after-ms", "10")
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            models = [{"id": "demo", "object": "model", "created": 1, "owned_by": "test"}]
            pages = {"/v1/models": {"object": "list", "data": models}, "/version": {"version": "1.2.3"}}
            content = json.dumps(pages.get(self.path, {})).encode()
            self.send_response(200 if self.path in pages else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", asked
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def content(request: dict) -> str:
    return request["messages"][-1]["content"]
