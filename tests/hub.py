"""A hub of Hugging Face's that runs on loopback: keeps what is pushed, and hands it out again.

It implements what huggingface_hub 2.4 asks for: who a token is, pages, branches, the mode of each
file, Git LFS, commits, and downloads.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs

TOKEN = "hf_" + "a" * 34


@dataclass
class Hub:
    """What the hub holds.

    Attributes:
        refusals: By the beginning of a path, the status that it is answered with.
        pages: Visibility of each page.
        files: Content by page, branch and file.
        asked: Every request, as `METHOD path`.
        large: Ends of the names that are kept by Git LFS.
        private: Pages whose files are for those with a token.
        elsewhere: Files are kept by another host, to which the hub sends whoever asks.
        leaked: Tokens that the other host was sent.
        commits: Of data sets, the commit that `main` is at.
    """

    endpoint: str = ""
    refusals: dict[str, int] = field(default_factory=dict)
    pages: dict[str, str | None] = field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    large: tuple[str, ...] = ()
    private: set[str] = field(default_factory=set)
    elsewhere: bool = False
    leaked: list[str] = field(default_factory=list)
    commits: dict[str, str] = field(default_factory=dict)

    def environment(self, cache: Any) -> dict[str, str]:
        """For a process that is to use this hub, logged in."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def commit(self, page: str, branch: str, lines: list[dict[str, Any]]) -> None:
        """Take the lines of a commit."""
        kept = self.files.setdefault((page, branch), {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                kept[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                kept[value["path"]] = self.objects[value["oid"]]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Answers", (_Answers,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self._dispatch()

    def do_GET(self) -> None:
        self._dispatch()

    def do_POST(self) -> None:
        self._dispatch()

    def do_PUT(self) -> None:
        self._dispatch()

    def _dispatch(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        body = self._body()
        for beginning, status in self.hub.refusals.items():
            if path.startswith(beginning):
                self._json({"error": "as the test wants it"}, status)
                return
        if path.startswith("/objects/"):
            self.hub.objects[path.rpartition("/")[2]] = body
            self._json({})
        elif self.command in ("GET", "HEAD") and "/resolve/" in path:
            self._file(path)
        elif path == "/":
            self._json({})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Invalid username or password."}, 401)
        else:
            self._api(path.strip("/").split("/"), body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _api(self, words: list[str], body: bytes) -> None:
        hub = self.hub
        match words:
            case ["api", "whoami-v2"]:
                self._json({"type": "user", "name": "tester", "orgs": []})
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                page = f"{asked['organization']}/{asked['name']}"
                private = asked.get("visibility") or ("private" if asked.get("private") else None)
                status = 409 if page in hub.pages else 200
                hub.pages.setdefault(page, private)
                self._json({"url": f"{hub.endpoint}/{page}", "id": page}, status)
            case ["api", "models", org, name, "branch", branch]:
                hub.files.setdefault((f"{org}/{name}", branch), {})
                self._json({})
            case ["api", "models", org, name, "preupload", _]:
                files = json.loads(body)["files"]
                self._json({"files": [self._mode(file["path"]) for file in files]})
            case ["api", "models", org, name, "commit", branch]:
                lines = [json.loads(line) for line in body.splitlines() if line]
                hub.commit(f"{org}/{name}", branch, lines)
                url = f"{hub.endpoint}/{org}/{name}/commit/{'c' * 40}"
                self._json({"success": True, "commitOid": "c" * 40, "commitUrl": url})
            case ["api", "datasets", org, name, *rest]:
                self._data_set(f"{org}/{name}", rest, body)
            case ["api", "models", org, name, "tree", *_]:
                kept = hub.files.get((f"{org}/{name}", "main"), {})
                self._json(
                    [
                        {"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
                        for file, content in kept.items()
                    ]
                )
            case ["api", "models", org, name, *_] if f"{org}/{name}" in hub.pages:
                kept = hub.files.get((f"{org}/{name}", "main"), {})
                siblings = [{"rfilename": file} for file in kept]
                page = f"{org}/{name}"
                self._json({"id": page, "sha": "c" * 40, "siblings": siblings, "tags": []})
            case [_, _, "info", "lfs", "objects", "batch"]:
                self._json({"transfer": "basic", "objects": self._places(json.loads(body))})
            case _:
                self._json({"error": f"nothing at {self.path}"}, 404)

    def _data_set(self, name: str, words: list[str], body: bytes) -> None:
        branch = words[1] if len(words) > 1 else "main"
        branch = "main" if branch == self.hub.commits.get(name, "c" * 40) else branch
        kept = self.hub.files.get((f"datasets/{name}", branch))
        if kept is None:
            status, code = (404, "RevisionNotFound") if branch != "main" else (401, "RepoNotFound")
            self._answer(status, b"", {"X-Error-Code": code})
            return
        entries = [
            {"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
            for file, content in kept.items()
        ]
        folders = {file.rpartition("/")[0] for file in kept} - {""}
        entries += [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
        match words:
            case ["tree", _, *within]:
                folder = "/".join([*within, ""])
                deep = "recursive=True" in self.path
                below = [entry for entry in entries if str(entry["path"]).startswith(folder)]
                self._json(
                    [e for e in below if deep or "/" not in str(e["path"]).removeprefix(folder)]
                )
            case ["paths-info", _]:
                asked = parse_qs(body.decode()).get("paths", [])
                self._json([entry for entry in entries if entry["path"] in asked])
            case _:
                sha = self.hub.commits.get(name, "c" * 40)
                siblings = [{"rfilename": file} for file in kept]
                self._json({"id": name, "sha": sha, "siblings": siblings, "tags": []})

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(self.hub.large) and self.hub.large else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _places(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {**file, "actions": {"upload": {"href": f"{self.hub.endpoint}/objects/{file['oid']}"}}}
            for file in asked["objects"]
        ]

    def _file(self, path: str) -> None:
        token = self.headers.get("Authorization")
        is_kept = path.startswith("/kept/")
        page, _, rest = path.removeprefix("/kept").strip("/").partition("/resolve/")
        if is_kept and token:
            self.hub.leaked.append(token)
        if page in self.hub.private and not is_kept and token != f"Bearer {TOKEN}":
            self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
            return
        branch, _, name = rest.partition("/")
        own = self.hub.commits.get(page.removeprefix("datasets/"), "c" * 40)
        branch = "main" if branch == own else branch
        if (page, branch) not in self.hub.files and page.startswith("datasets/"):
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        content = self.hub.files.get((page, branch), {}).get(name)
        if content is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.hub.elsewhere and not is_kept:
            host = self.hub.endpoint.replace("127.0.0.1", "localhost")
            self._answer(302, b"", {"Location": f"{host}/kept{path}?Signature=of-the-hub"})
            return
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": own}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            self._answer(206, part, headers)
            return
        self._answer(200, content, headers)

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
