"""A hub of Hugging Face's kind on 127.0.0.1: repositories of a few files, each at one commit.

It answers what `huggingface_hub` and `datasets` ask to find and fetch files of a commit, keeps what
it was asked, and can misbehave: a repository can be gone, or answer with another commit.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree|paths-info)/([^/]+)(/.*)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class FakeHub:
    """What is stored and asked."""

    def __init__(self) -> None:
        """Has nothing yet."""
        self.repositories: dict[tuple[str, str, str], dict[str, bytes]] = {}
        """Files by path, by (`models` or `datasets`, `owner/name`, commit)."""
        self.answers_with: dict[str, str] = {}
        """The commit that a repository says its answers are of, if not the one asked for."""
        self.gone: set[str] = set()
        """Repositories, a request for which gets no answer at all."""
        self.asked: list[tuple[str, str]] = []
        """(method and path, authorization) of each request."""
        self.url = ""

    @contextlib.contextmanager
    def serving(self) -> Iterator["FakeHub"]:
        """Answers on a free port while the block runs."""
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((f"{self.command} {path}", self.headers.get("Authorization", "")))
        if api := _API.fullmatch(path):
            kind, name, what, commit, below = api.groups()
        elif file := _FILE.fullmatch(path):
            kind = "datasets" if file[1] else "models"
            name, what, commit, below = file[2], "resolve", file[3], file[4]
        else:
            return self._send(404, b"{}")
        if name in self.hub.gone:
            self.close_connection = True
            return None
        files = self.hub.repositories.get((kind, name, commit))
        if files is None:
            known = any(repository[:2] == (kind, name) for repository in self.hub.repositories)
            missing = "RevisionNotFound" if known else "RepoNotFound"
            return self._send(404, b"{}", {"X-Error-Code": missing})
        sha = self.hub.answers_with.get(name, commit)
        match what:
            case "resolve":
                return self._file(files.get(below), sha)
            case "revision":
                siblings = [{"rfilename": path} for path in files]
                return self._json({"id": name, "sha": sha, "siblings": siblings, "private": False})
            case "tree":
                return self._json([_entry(path, data) for path, data in files.items()])
            case _:
                sent = parse_qs(body.decode())
                paths = sent.get("paths", []) or json.loads(body).get("paths", [])
                return self._json([_entry(path, files[path]) for path in paths if path in files])

    def _file(self, data: bytes | None, commit: str) -> None:
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return self._send(200, data, headers | {"Accept-Ranges": "bytes"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        total = len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and status == 200:
            first, last = int(asked[1]), min(int(asked[2] or total), total - 1)
            data, status = data[first : last + 1], 206
            headers = (headers or {}) | {"Content-Range": f"bytes {first}-{last}/{total}"}
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(path: str, data: bytes) -> dict[str, object]:
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}
