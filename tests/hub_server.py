"""A hub on loopback: the endpoints that `huggingface_hub` uses to push and fetch a model, over HTTP.

Repositories are kept in memory, one dict of files for each commit. Writing needs `WRITE_TOKEN`, reading a
private repository too; an owner named "other" belongs to somebody else.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRITE_TOKEN = "hf_write"
OTHER = "other"  # an owner whose repositories the token may not write


@dataclass
class Repository:
    """Files by path of each commit, and the commit of each branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit of all files; returns its hash."""
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(content + str(len(self.commits)).encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        return commit

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a branch or a commit."""
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class Hub(ThreadingHTTPServer):
    """The server: repositories, uploaded objects by SHA-256, and the requests that it had."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that runs in a thread while the block does."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    @property
    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {WRITE_TOKEN}"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self._begin()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path):
            self._info(*match.groups())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._fail(404, "EntryNotFound")

    def do_POST(self) -> None:
        path, body = self._begin(), self._body()
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if not self._may_write:
            return self._fail(401, None)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            return self._preupload(json.loads(body))
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        return self._fail(404, None)

    def do_PUT(self) -> None:
        oid, data = self._begin().rpartition("/")[2], self._body()
        if hashlib.sha256(data).hexdigest() != oid:
            return self._fail(400, None)
        self.server.objects[oid] = data
        return self._answer({})

    def _begin(self) -> str:
        self.server.requests.append(f"{self.command} {self.path}")
        return self.path.partition("?")[0]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _revision(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files); answers the request itself where there is none."""
        repository = self.server.repositories.get(repo)
        if repository is None or repository.private and not self._may_write:
            self._fail(401 if not self._may_write else 404, "RepoNotFound")
            return None
        found = repository.files(revision)
        if found is None:
            self._fail(404, "RevisionNotFound")
        return found

    def _info(self, repo: str, revision: str) -> None:
        if found := self._revision(repo, revision):
            commit, files = found
            self._answer({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})

    def _tree(self, repo: str, revision: str) -> None:
        if found := self._revision(repo, revision):
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in found[1].items()
            ]
            self._answer(rows)

    def _file(self, repo: str, revision: str, name: str) -> None:
        if not (found := self._revision(repo, revision)):
            return
        commit, files = found
        if name not in files:
            self._fail(404, "EntryNotFound")
        else:
            etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
            self._send(200, files[name], {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})

    def _create(self, wanted: dict[str, Any]) -> None:
        owner = wanted.get("organization") or "me"
        repo = f"{owner}/{wanted['name']}"
        if owner == OTHER:
            self._fail(403, None)
        elif repo in self.server.repositories:
            self._answer({"url": f"{self.server.address}/{repo}"}, 409)
        else:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.server.repositories[repo] = new = Repository(private)
            new.commit({})
            self._answer({"url": f"{self.server.address}/{repo}"})

    def _preupload(self, wanted: dict[str, Any]) -> None:
        modes = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for each in wanted["files"]
        ]
        self._answer({"files": modes})

    def _batch(self, wanted: dict[str, Any]) -> None:
        rows = [
            {**each, "actions": {"upload": {"href": f"{self.server.address}/upload/{each['oid']}"}}}
            for each in wanted["objects"]
        ]
        self._answer({"transfer": "basic", "objects": rows})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        repository = self.server.repositories[repo]
        _, files = repository.files("main") or ("", {})
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        address = f"{self.server.address}/{repo}/commit/{commit}"
        self._answer({"success": True, "commitOid": commit, "commitUrl": address})

    def _answer(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str | None) -> None:
        self._send(status, b"{}", {} if code is None else {"X-Error-Code": code})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
