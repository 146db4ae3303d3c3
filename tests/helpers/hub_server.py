"""A small local Hugging Face Hub server with the routes that huggingface_hub uses to upload and download without Xet.

Repositories are kept in memory. Tests switch on single faults to see how a client handles them:

    with HubServer() as hub:
        hub.fail("PUT", "/lfs/", "drop")  # the next upload breaks off in the middle
        ...  # start processes with hub.environment(home)
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKENS = {"hf_ada": "ada", "hf_bob": "bob", "hf_me": "me"}


@dataclass
class File:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """The Hub's id of the file: SHA-256 for a large file, git's SHA-1 for a small one."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    private: bool
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)  # the newest last

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


@dataclass
class Fault:
    method: str
    route: str  # regular expression, searched in the path
    kind: int | str
    times: int


class Refusal(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """The server. Tests may inspect `repos`, `objects` (large files) and `log` (method, path)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fail(self, method: str, route: str, kind: int | str, *, times: int = 1) -> None:
        """Make the next requests with this method and path fail.

        Args:
            method: Such as GET.
            route: Regular expression that is searched in the path.
            kind: A status to respond with; or `"drop"`: close the connection in the middle of the request or response;
                or `"lost"`: handle the request and close the connection without a response; or `"damage"`: send other
                bytes of the same length.
            times: Number of requests.
        """
        self.faults.append(Fault(method, route, kind, times))

    def next_fault(self, method: str, path: str) -> int | str | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.route, path):
                    fault.times -= 1
                    return fault.kind
        return None

    def environment(self, home: Path, token: str | None = "hf_ada") -> dict[str, str]:
        """Environment variables that make another process use this server; its cache is empty if `home` is new."""
        variables = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return variables | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | ({"HF_TOKEN": token} if token else {})

    def count(self, method: str, route: str) -> int:
        """Return the number of such requests so far."""
        return sum(1 for seen, path in self.log if seen == method and re.search(route, path))

    def head(self, repo_id: str, branch: str = "main") -> Commit:
        return self.repos[repo_id].branches[branch][-1]

    def add_commit(self, repo_id: str, branch: str, title: str, files: dict[str, File]) -> Commit:
        commits = self.repos[repo_id].branches.setdefault(branch, [])
        oid = hashlib.sha1(f"{repo_id} {branch} {len(commits)} {title}".encode()).hexdigest()
        commits.append(Commit(oid, title, files))
        return commits[-1]

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> None:
        """Create a repository, empty as the website creates it or with files."""
        self.repos[repo_id] = Repo(private)
        content = {".gitattributes": b"*.safetensors filter=lfs\n"} | (files or {})
        made = {name: File(data, is_large(name)) for name, data in content.items()}
        self.objects |= {file.oid: file.content for file in made.values() if file.lfs}
        self.add_commit(repo_id, "main", "initial commit", made)


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".png"))


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.query = urlsplit(self.path).query
        with self.hub.lock:
            self.hub.log.append((self.command, path))
        self.fault = self.hub.next_fault(self.command, path)
        if self.fault == "drop" and self.command in ("POST", "PUT"):
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self.close_connection = True
            return
        self.body = self.read_body()
        try:
            if isinstance(self.fault, int):
                raise Refusal(self.fault, "switched on in the test")
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    with self.hub.lock:
                        action(self, **match.groupdict())
                    return
            raise Refusal(404, f"no route {self.command} {path}")
        except Refusal as refusal:
            self.answer({"error": str(refusal)}, refusal.status, {"X-Error-Code": refusal.code} if refusal.code else {})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send JSON or raw bytes; break off if the fault is "lost" or "drop"."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.fault == "lost":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.fault == "drop" else data)
        self.close_connection = self.close_connection or self.fault == "drop"

    def user(self) -> str | None:
        """Return the token's user, or None without a token; reject a wrong token as the Hub does."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        user, repo = self.user(), self.hub.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and user != owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if repo.gated and user != owner:
            raise Refusal(403, f"Access to {repo_id} is restricted", "GatedRepo")
        if write and user != owner:
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")
        return repo

    def commit_at(self, repo_id: str, revision: str) -> Commit:
        commit = self.repo(repo_id).find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        self.answer({"type": "user", "name": user, "orgs": []})

    def create(self) -> None:
        asked, user = json.loads(self.body), self.user()
        owner = asked.get("organization") or user
        if user is None or owner != user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if repo_id in self.hub.repos:
            self.answer({"error": "You already created this model repo", **answer}, 409)
            return
        self.hub.add_repo(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.answer(answer)

    def validate(self) -> None:
        metadata = yaml.safe_load(json.loads(self.body)["content"].split("---\n")[1])
        fine = isinstance(metadata, dict) and metadata.get("license") != ""
        self.answer({"errors": [] if fine else [{"message": "no metadata"}], "warnings": []}, 200 if fine else 400)

    def preupload(self, repo_id: str, revision: str) -> None:
        self.repo(repo_id, write="create_pr=1" not in self.query)
        there = self.commit_at(repo_id, revision).files
        about = []
        for file in json.loads(self.body)["files"]:
            path, mode = file["path"], "lfs" if is_large(file["path"]) else "regular"
            oid = there[path].oid if path in there else None
            about.append({"path": path, "shouldIgnore": False, "uploadMode": mode, "oid": oid})
        self.answer({"files": about})

    def batch(self, repo_id: str) -> None:
        self.repo(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}
                verify = {"href": f"{self.hub.endpoint}/lfs-verify/{wanted['oid']}", "header": {}}
                objects[-1]["actions"] = {"upload": upload, "verify": verify}
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content is not what its name says")
        self.hub.objects[oid] = self.body
        self.answer(b"")

    def verify(self, oid: str) -> None:
        if oid not in self.hub.objects:
            raise Refusal(404, f"{oid} was not uploaded")
        self.answer({})

    def commit(self, repo_id: str, revision: str) -> None:
        pull_request = "create_pr=1" in self.query
        repo = self.repo(repo_id, write=not pull_request)
        files, title = dict(self.commit_at(repo_id, revision).files), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]], lfs=True)
            else:
                raise Refusal(400, f"operation {line['key']}")
        requests = sum(branch.startswith("refs/pr/") for branch in repo.branches)
        branch = f"refs/pr/{requests + 1}" if pull_request else revision
        commit = self.hub.add_commit(repo_id, branch, title, files)
        url = f"{self.hub.endpoint}/{repo_id}"
        discussion = f"{url}/discussions/{requests + 1}" if pull_request else None
        self.answer({"commitUrl": f"{url}/commit/{commit.oid}", "commitOid": commit.oid, "pullRequestUrl": discussion})

    def info(self, repo_id: str, revision: str = "main") -> None:
        repo, commit = self.repo(repo_id), self.commit_at(repo_id, revision)
        siblings = [{"rfilename": name} for name in commit.files]
        about = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "private": repo.private, "tags": []}
        self.answer({**about, "sha": commit.oid, "siblings": siblings, "downloads": 0, "likes": 0})

    def tree(self, repo_id: str, revision: str) -> None:
        files = self.commit_at(repo_id, revision).files
        self.answer([
            {"type": "file", "path": name, "oid": file.oid, "size": len(file.content)} for name, file in files.items()
        ])  # fmt: skip

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        commit = self.commit_at(repo_id, revision)
        if name not in commit.files:
            self.answer(
                {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid}
            )
            return
        file = commit.files[name]
        content, status, headers = file.content, 200, {"ETag": f'"{file.oid}"', "X-Repo-Commit": commit.oid}
        if self.fault == "damage":
            content = bytes(byte ^ 1 for byte in content)
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(wanted[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
        self.answer(content, status, headers)


_ID = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate),
    (("POST",), rf"/api/models/{_ID}/preupload/(?P<revision>.+)", Handler.preupload),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", Handler.upload),
    (("POST",), "/lfs-verify/(?P<oid>[0-9a-f]{64})", Handler.verify),
    (("POST",), rf"/api/models/{_ID}/commit/(?P<revision>.+)", Handler.commit),
    (("GET",), rf"/api/models/{_ID}", Handler.info),
    (("GET",), rf"/api/models/{_ID}/revision/(?P<revision>.+)", Handler.info),
    (("GET",), rf"/api/models/{_ID}/tree/(?P<revision>[^/]+)", Handler.tree),
    (("GET", "HEAD"), rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
]
