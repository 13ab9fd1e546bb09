"""A hub that is served here on this machine."""

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

from sae.dictionaries import source

COMMIT = "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567"


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as is needed: the folder `root`/owner/repository under the revisions "main" and "v2"."""

    root: Path
    asked: list[str]

    def do_GET(self):
        path = unquote(self.path)
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/tree/([^/?]+)/?([^?]*)(\?.*)?", path):
            return self.tree(*found.groups()[:3])
        found = re.fullmatch(r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        file = self.place(found[1], found[2], found[3])
        if file is None:
            return None
        if self.command == "GET":
            self.asked.append(found[3])
        data = file.read_bytes()
        self.answer(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{len(data)}-{hash(found[3]) & 0xFFFFFF}"'})
        return None

    do_HEAD = do_GET

    def place(self, repo, revision, inside):
        error = None
        if not (self.root / repo).is_dir():
            error = "RepoNotFound"
        elif revision not in ("main", "v2", COMMIT):
            error = "RevisionNotFound"
        elif not (self.root / repo / inside).exists():
            error = "EntryNotFound"
        if error:
            self.answer(401 if error == "RepoNotFound" else 404, b"{}", {"X-Error-Code": error})
        return None if error else self.root / repo / inside

    def tree(self, repo, revision, inside):
        folder = self.place(repo, revision, inside)
        if folder is None:
            return
        prefix = f"{inside}/" if inside else ""
        rows = [
            {"type": "directory" if one.is_dir() else "file", "path": prefix + one.name, "size": one.stat().st_size, "oid": "0"}
            for one in sorted(folder.iterdir())
        ]
        self.answer(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})

    def answer(self, status, data, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without anything on it, an empty cache, and a working directory without anything in it."""
    source._on_hub.cache_clear()
    Hub.root, Hub.asked = tmp_path / "served", []
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def offline(monkeypatch):
    def switch():
        source._on_hub.cache_clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    return switch
