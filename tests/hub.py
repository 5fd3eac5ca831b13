"""A Hugging Face hub in one process: it creates model repositories, takes commits, and serves the files over HTTP."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Hub(BaseHTTPRequestHandler):
    repositories: dict[str, dict[str, bytes]] = {}  # repository -> path -> content

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = unquote(self.path).strip("/").split("/")
        if parts[1:] == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories.setdefault(name, {})
            return self.answer({"url": f"{self.endpoint}/{name}", "name": name, "id": "1"})
        if parts[1:] == ["validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        name, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]
            return self.answer({"files": files})
        assert action == "commit", self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.endpoint}/{name}/commit/{'0' * 40}"})

    def do_GET(self) -> None:
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        if parts[4:5] == ["tree"]:  # asked of subfolders only; there are none
            return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
        if parts[:2] == ["api", "models"]:
            files = [{"rfilename": path} for path in self.repositories.get("/".join(parts[2:4]), {})]
            return self.answer({"id": "/".join(parts[2:4]), "sha": "0" * 40, "siblings": files, "tags": [],
                                "private": False, "downloads": 0, "likes": 0})
        content = self.repositories.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
        headers = {"X-Repo-Commit": "0" * 40}
        if content is None:
            return self.answer(b"", 404, {**headers, "X-Error-Code": "EntryNotFound"})
        self.answer(content, 200, {**headers, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    do_HEAD = do_GET

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, value: dict | bytes, status: int = 200, headers: dict | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def running_hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """Yields the address of a fresh hub (for HF_ENDPOINT) and its repositories."""
    handler = type("Hub", (Hub,), {"repositories": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.repositories
    finally:
        server.shutdown()
        server.server_close()
