"""A model hub on this machine, with the routes that ``huggingface_hub`` asks: files of folders, by repository."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


@contextmanager
def serving(repositories: Mapping[str, Path]) -> Iterator[str]:
    """The hub's address while it serves each folder as the repository of that name."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            name = re.match(r"(?:/api/models)?/(\w+/\w+)", self.path)
            if name is None or name[1] not in repositories:
                return self.send_error(404)
            if found := re.fullmatch(r"/api/models/(\w+/\w+)(/revision/\w+|/tree/\w+)?", self.path.partition("?")[0]):
                return self.answer(json.dumps(self.listing(found[1], found[2] or "")).encode())
            if found := re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.+)", self.path):
                file = repositories[found[1]] / found[2]
                return self.answer(file.read_bytes()) if file.is_file() else self.send_error(404)
            return self.send_error(404)

        def listing(self, name: str, route: str) -> object:
            folder = repositories[name]
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
            if route.startswith("/tree"):
                return [{"type": "file", "path": path, "size": size, "oid": path} for path, size in names.items()]
            return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in names]}

        def answer(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{abs(hash(data)):x}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
