"""A stand-in for the Hugging Face hub: the part of its HTTP API that its own client asks for adapters, in memory.

It knows models only, and one token. Commits are never the real hub's: their names are counted.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_right"
LARGE = 1000  # bytes, from which a file is one of git-lfs

Files = dict[str, bytes]


@dataclass
class Repository:
    """A model, its branches and tags, and who may see it."""

    commits: dict[str, Files] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Files, revision: str = "main") -> str:
        """Make these files the content of a branch."""
        name = hashlib.sha1(f"{len(self.commits)}".encode(), usedforsecurity=False).hexdigest()
        self.commits[name] = files
        self.revisions[revision] = name
        return name

    def find(self, revision: str) -> str | None:
        """Return the commit of a branch, a tag or a commit's name."""
        return revision if revision in self.commits else self.revisions.get(revision)


class Hub:
    """The state of a stand-in, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.lock = Lock()
        self.before_commit: list[Callable[[], object]] = []
        """Called, each once, when a commit is about to be made."""
        self.damaged: set[str] = set()
        """Files of which another content is sent than is stated."""

    def add(self, hub_id: str, files: Files, **settings: bool) -> Repository:
        """Create a repository with one commit."""
        repository = self.repositories[hub_id] = Repository(**settings)
        repository.commit(files)
        return repository


def sibling(path: str, content: bytes) -> dict[str, Any]:
    """How the hub describes a file."""
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
    large = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return {"rfilename": path, "size": len(content), "blobId": blob} | ({"lfs": large} if len(content) >= LARGE else {})


def entry(path: str, content: bytes) -> dict[str, Any]:
    """How the hub describes a file in a tree."""
    facts = sibling(path, content)
    large = {"lfs": {**facts["lfs"], "oid": facts["lfs"]["sha256"]}} if "lfs" in facts else {}
    return {"type": "file", "path": path, "size": len(content), "oid": facts["blobId"], **large}


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        self.hub.asked.append(f"{self.command} {path}")
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, path):
                method(self, *match.groups(), body=body)
                return
        self.send(404, {"error": f"no such route: {path}"})

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, content: object = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def logged_in(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def repository(self, hub_id: str) -> Repository | None:
        """Return a repository that the client may see; else answer."""
        repository = self.hub.repositories.get(hub_id)
        if repository is None or (repository.private and not self.logged_in):
            self.send(
                401 if not self.logged_in else 404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound"
            )
            return None
        return repository

    def commit(self, hub_id: str, revision: str | None) -> tuple[str, Files] | None:
        """Return a commit that the client may see; else answer."""
        repository = self.repository(hub_id)
        if repository is None:
            return None
        name = repository.find(revision or "main")
        if name is None:
            self.send(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
            return None
        return name, repository.commits[name]

    def info(self, hub_id: str, revision: str | None, *, body: bytes) -> None:
        if commit := self.commit(hub_id, revision):
            name, files = commit
            self.send(200, {"id": hub_id, "sha": name, "siblings": [sibling(*file) for file in files.items()]})

    def tree(self, hub_id: str, revision: str, folder: str | None, *, body: bytes) -> None:
        if commit := self.commit(hub_id, revision):
            prefix = f"{folder}/" if folder else ""
            listing = [entry(*file) for file in commit[1].items() if file[0].startswith(prefix)]
            if listing or not folder:
                self.send(200, listing)
            else:
                self.send(404, {"error": f"{folder} does not exist"}, X_Error_Code="EntryNotFound")

    def paths_info(self, hub_id: str, revision: str, *, body: bytes) -> None:
        if commit := self.commit(hub_id, revision):
            paths = parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
            self.send(200, [entry(path, commit[1][path]) for path in paths if path in commit[1]])

    def resolve(self, hub_id: str, revision: str, path: str, *, body: bytes) -> None:
        commit = self.commit(hub_id, revision)
        if commit is None:
            return
        name, files = commit
        if self.hub.repositories[hub_id].gated and not self.logged_in:
            self.send(403, {"error": "gated"}, X_Error_Code="GatedRepo")
        elif path not in files:
            self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=name)
        else:
            content, facts = files[path], sibling(path, files[path])
            etag = facts["lfs"]["sha256"] if "lfs" in facts else facts["blobId"]
            if path in self.hub.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            status, span = 200, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range") or "")
            if span:
                status, content = 206, content[int(span[1]) : int(span[2]) + 1]
            self.send(status, content, ETag=f'"{etag}"', X_Repo_Commit=name)

    def create(self, *, body: bytes) -> None:
        wish = json.loads(body)
        hub_id = f"{wish['organization'] or 'someone'}/{wish['name']}"
        if not self.logged_in:
            self.send(401, {"error": "Invalid username or password."})
        elif hub_id in self.hub.repositories:
            self.send(409, {"error": "You already created this model repo", "url": f"/{hub_id}"})
        else:
            private = wish.get("private") or wish.get("visibility") == "private"
            self.hub.add(hub_id, {".gitattributes": b""}, private=bool(private))
            self.send(200, {"url": f"/{hub_id}", "id": hub_id, "name": hub_id})

    def branch(self, hub_id: str, branch: str, *, body: bytes) -> None:
        repository = self.repository(hub_id)
        if repository is not None:
            exists = branch in repository.revisions
            repository.revisions.setdefault(branch, repository.revisions["main"])
            self.send(409 if exists else 200, {"error": "Reference already exists"} if exists else {})

    def preupload(self, hub_id: str, _: str, *, body: bytes) -> None:
        files = json.loads(body)["files"]
        modes = [
            {"path": each["path"], "uploadMode": "lfs" if each["size"] >= LARGE else "regular", "shouldIgnore": False}
            for each in files
        ]
        self.send(200, {"files": modes})

    def batch(self, _: str, *, body: bytes) -> None:
        url = f"http://{self.headers['host']}/upload/"
        objects = [
            {"oid": each["oid"], "size": each["size"], "actions": {"upload": {"href": url + each["oid"]}}}
            for each in json.loads(body)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str, *, body: bytes) -> None:
        self.hub.uploads[oid] = body
        self.send(200)

    def push(self, hub_id: str, revision: str, *, body: bytes) -> None:
        repository = self.hub.repositories[hub_id]
        if not self.logged_in:
            self.send(403, {"error": "You have no rights to write"})
            return
        with self.hub.lock:
            self.commit_lines(hub_id, repository, revision, body)

    def commit_lines(self, hub_id: str, repository: Repository, revision: str, body: bytes) -> None:
        head = repository.revisions[revision]
        if self.hub.before_commit:
            self.hub.before_commit.pop()()
        files = dict(repository.commits[head])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", head) != repository.revisions[revision]:
                self.send(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        name = repository.commit(files, revision)
        self.send(200, {"commitUrl": f"http://{self.headers['host']}/{hub_id}/commit/{name}", "commitOid": name})

    def valid(self, *, body: bytes) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def log_message(self, *_: object) -> None:
        pass


NAME = r"([^/]+/[^/]+)"
ROUTES = (
    (f"/api/models/{NAME}(?:/revision/(.+))?", Handler.info),
    (f"/api/models/{NAME}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    (f"/api/models/{NAME}/paths-info/(.+)", Handler.paths_info),
    (f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (f"/api/models/{NAME}/commit/(.+)", Handler.push),
    (f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("/api/repos/create", Handler.create),
    ("/api/validate-yaml", Handler.valid),
    (f"/{NAME}.git/info/lfs/objects/batch", Handler.batch),
    ("/upload/(.+)", Handler.upload),
    (f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
)


@contextmanager
def hub_server() -> Iterator[tuple[Hub, str]]:
    """Serve a hub; yield it and its address."""
    hub = Hub()
    handler = type("ThisHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
