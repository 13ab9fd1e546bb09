"""A hub of this machine with one data set, me/mine: what huggingface_hub asks for when files of a repository are listed and read."""

import json
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "me/mine"


class Hub:
    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.main = ""
        self.requests: list[str] = []
        self.refuses = False
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def commit(self, folder: Path) -> str:
        """The folder's files become those of the repository's main branch, under cache/."""
        files = {f"cache/{path.relative_to(folder)}": path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        self.main = sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[self.main] = files
        return self.main

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: bytes | list | dict, code: int = 200) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _missing(self, what: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", what)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _files(self, revision: str) -> dict[str, bytes]:
        return self.hub.commits.get(self.hub.main if revision == "main" else revision, {})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(path)
        if path == f"/api/datasets/{REPO}" or path.startswith(f"/api/datasets/{REPO}/revision/"):
            revision = path.rpartition("/")[2]
            return self._answer({"id": REPO, "sha": revision if revision in self.hub.commits else self.hub.main})
        if path.startswith(f"/api/datasets/{REPO}/tree/"):
            revision, _, folder = path.removeprefix(f"/api/datasets/{REPO}/tree/").partition("/")
            if self.hub.refuses:
                return self._answer(b"", 403)
            found = _entries(self._files(revision), folder)
            return self._answer(found) if found else self._missing("EntryNotFound")
        if path.startswith(f"/datasets/{REPO}/resolve/"):
            revision, _, name = path.removeprefix(f"/datasets/{REPO}/resolve/").partition("/")
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            return self._answer(self._files(revision)[name][int(first) : int(last) + 1], 206)
        self._missing("RepoNotFound")

    def do_POST(self) -> None:
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        revision = unquote(self.path).rpartition("/")[2]
        files = self._files(revision)
        self._answer([entry for name in asked for entry in _entries(files, name.rpartition("/")[0]) if entry["path"] == name])


def _entries(files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
    """What is directly in a folder."""
    found: dict[str, dict[str, Any]] = {}
    for name, data in files.items():
        if name.startswith(f"{folder}/" if folder else ""):
            inside, _, deeper = name[len(folder) + bool(folder) :].partition("/")
            path = f"{folder}/{inside}".lstrip("/")
            oid = sha1(data).hexdigest()
            found[path] = {"type": "directory" if deeper else "file", "path": path, "size": 0 if deeper else len(data), "oid": oid}
    return list(found.values())
