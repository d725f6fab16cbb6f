"""A Hugging Face Hub on loopback: the part of its HTTP protocol that publishing and loading a model use.

    with HubServer() as hub:
        os.environ["HF_ENDPOINT"] = hub.url          # before huggingface_hub is imported
        os.environ["HF_HUB_DISABLE_XET"] = "1"       # large files go by Git LFS, as to the Hub without hf-xet

It keeps repositories in memory: commits of files, branches, pull requests, large objects by their sha256; the files of
gated repositories are refused. It does not speak: Xet, multipart uploads, private repositories' access rules,
organisations, tags, discussions, listing by pages, renamed repositories, rate limits.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants

LARGE = (".safetensors", ".bin", ".png", ".jpg")  # the Hub's .gitattributes: these go to the large-file store
TOKENS = {"hf_writer": ("you", "write"), "hf_reader": ("you", "read"), "hf_other": ("other", "write")}


@dataclass(frozen=True)
class File:
    """A file of a commit. `oid` is git's own, or the sha256 of a large file, as the Hub names them."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits and what the branches point to; `created` is the body of the request that made it."""

    id: str
    kind: str
    created: dict[str, Any]
    commits: list[tuple[str, dict[str, File], str]] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File], message: str, ref: str) -> str:
        listing = repr((len(self.commits), sorted((path, file.oid) for path, file in files.items())))
        oid = hashlib.sha1(f"{self.kind}/{self.id} {listing}".encode()).hexdigest()
        self.commits.append((oid, files, message))
        self.refs[ref] = oid
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, File]] | None:
        oid = self.refs.get(revision, revision)
        return next(((oid, files) for commit, files, _ in self.commits if commit == oid), None)


class HubServer:
    """The server; use it as a context.

    Attributes:
        repositories: by kind ("models", "spaces") and id.
        requests: "METHOD /path" of every request, in order.
        gated: ids of repositories whose licence the user has not accepted.
        faults: called before each request with method and path; True drops the connection, a number is the status
            of an error.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.faults: Callable[[str, str], bool | int] = lambda method, path: False
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.store_url = f"http://localhost:{self.server.server_port}"  # large files come from another host

    def __enter__(self) -> HubServer:
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def repository(self, repo_id: str, kind: str = "models") -> Repository:
        return self.repositories[kind, repo_id]

    def put(self, repo_id: str, files: dict[str, bytes]) -> None:
        """A commit of these files, as if somebody had uploaded them."""
        repository = self.repositories.setdefault(("models", repo_id), Repository(repo_id, "models", {}))
        stored = {name: File(content, name.endswith(LARGE)) for name, content in files.items()}
        self.objects |= {file.oid: file.content for file in stored.values() if file.large}
        repository.commit(stored, "put", "main")

    def files(self, repo_id: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        """The files of a revision."""
        found = self.repository(repo_id, kind).at(revision)
        assert found is not None
        return {path: file.content for path, file in found[1].items()}


@contextmanager
def hub_for(monkeypatch: Any, home: Path) -> Iterator[HubServer]:
    """A Hub that this process and its children use, with a token that may write and a cache in `home`."""
    with HubServer() as server:
        settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        for name, value in {**settings, "HF_TOKEN": "hf_writer", "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        # The client reads these when it is imported, which it is already here.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HOME", str(home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


class Refused(Exception):
    """An error that the client shall see: status, the Hub's error code, message."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


REPO = r"(?P<repo>[^/]+/[^/]+)"
KIND = r"(?P<kind>models|spaces)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", rf"/api/{KIND}/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/{KIND}/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/{KIND}/{REPO}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", rf"/api/{KIND}/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", "tree"),
    ("GET", rf"/api/{KIND}/{REPO}(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"/api/{KIND}/{REPO}/refs", "list_refs"),
    ("POST", rf"/((?P<space>spaces)/)?{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", r"/lfs/verify", "lfs_verify"),
    ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_get"),
    ("GET", rf"/((?P<space>spaces)/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    """One request: find the route, answer JSON or bytes, errors as the Hub words them."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer("GET")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, method: str) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {address.path}")
            fault = self.hub.faults(self.command, address.path)
        if fault is True:
            self.close_connection = True
            return self.connection.close()
        try:
            if fault:
                raise Refused(int(fault), message="a fault of the test")
            for verb, pattern, name in ROUTES:
                if verb == method and (match := re.fullmatch(pattern, address.path)):
                    with self.hub.lock:
                        return getattr(self, name)(**{key: unquote(v) for key, v in match.groupdict().items() if v})
            raise Refused(404, "EntryNotFound", "no such address")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message, **({"X-Error-Code": refused.code} if refused.code else {})}
            self.send_json({"error": refused.message}, refused.status, headers)

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    # --- who asks, and for what ---------------------------------------------------------------------------------

    def user(self) -> tuple[str, str]:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in TOKENS:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return TOKENS[token]

    def writer(self, repo: str, may_ask: bool = False) -> str:
        """The user, who must be allowed to write to `repo`, or with `may_ask` to open pull requests."""
        name, role = self.user()
        if role != "write":
            raise Refused(403, message="Forbidden: this token has no write access")
        if repo.partition("/")[0] != name and not may_ask:
            raise Refused(403, message=f"You don't have the rights to create a model under the namespace {repo}")
        return name

    def find(self, kind: str, repo: str) -> Repository:
        if (kind, repo) not in self.hub.repositories:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return self.hub.repositories[kind, repo]

    def snapshot(self, kind: str, repo: str, revision: str) -> tuple[str, dict[str, File]]:
        found = self.find(kind, repo).at(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # --- routes --------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        name, role = self.user()
        self.send_json({"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def validate_yaml(self) -> None:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        self.send_json({"errors": [], "warnings": [] if header else [{"message": "empty or missing metadata"}]})

    def create(self) -> None:
        body = json.loads(self.body)
        name = self.user()[0]
        repo = f"{body.get('organization') or name}/{body['name']}"
        self.writer(repo)
        kind = f"{body.get('type') or 'model'}s"
        url = f"{self.hub.url}/{'spaces/' if kind == 'spaces' else ''}{repo}"
        if (kind, repo) in self.hub.repositories:
            return self.send_json({"error": "You already created this repo", "url": url}, 409)
        self.hub.repositories[kind, repo] = Repository(repo, kind, body)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
        self.hub.repositories[kind, repo].commit(
            {".gitattributes": File(attributes.encode(), False)}, "initial commit", "main"
        )
        self.send_json({"url": url, "name": repo})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        self.writer(repo, may_ask="create_pr" in self.query)
        _, files = self.snapshot(kind, repo, revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            known = files.get(file["path"])
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            answer[-1] |= {"oid": known.oid} if known else {}
        self.send_json({"files": answer})

    def lfs_batch(self, repo: str, space: str = "") -> None:
        self.find("spaces" if space else "models", repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}"}
            verify = {"href": f"{self.hub.url}/lfs/verify"}
            stored = asked["oid"] in self.hub.objects
            objects.append(asked if stored else {**asked, "actions": {"upload": upload, "verify": verify}})
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, message="the content is not what was announced")
        self.hub.objects[oid] = self.body
        self.send(b"")

    def lfs_verify(self) -> None:
        asked = json.loads(self.body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, message="not stored")
        self.send_json({})

    def lfs_get(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise Refused(400, message="the token was sent to the large-file store")
        self.send(self.hub.objects[oid], headers={"ETag": f'"{oid}"'})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        asks = "create_pr" in self.query
        self.writer(repo, may_ask=asks)
        parent, files = self.snapshot(kind, repo, revision)
        files, message = dict(files), ""
        for line in self.body.decode().splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    raise Refused(412, message="A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refused(400, message=f"the large file of {value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, message=f"unknown operation {key}")
        repository = self.find(kind, repo)
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        oid = repository.commit(files, message, f"refs/pr/{number}" if asks else revision)
        url = f"{self.hub.url}/{'spaces/' if kind == 'spaces' else ''}{repo}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
        self.send_json({**answer, "pullRequestUrl": f"{url}/discussions/{number}"} if asks else answer)

    def info(self, kind: str, repo: str, revision: str = "main") -> None:
        oid, files = self.snapshot(kind, repo, revision)
        private = self.find(kind, repo).created.get("visibility") == "private"
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.send_json({"id": repo, "modelId": repo, "sha": oid, "private": private, "tags": [], "siblings": siblings})

    def list_refs(self, kind: str, repo: str) -> None:
        refs = self.find(kind, repo).refs
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": refs[name]} for name in refs]
        self.send_json({"branches": branches, "converts": [], "tags": []})

    def tree(self, kind: str, repo: str, revision: str, folder: str = "") -> None:
        _, files = self.snapshot(kind, repo, revision)
        inside = {path: file for path, file in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self.send_json([self.describe(path, file) for path, file in sorted(inside.items())])

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        _, files = self.snapshot(kind, repo, revision)
        asked = json.loads(self.body)["paths"]
        self.send_json([self.describe(path, files[path]) for path in asked if path in files])

    def describe(self, path: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
        if file.large:
            entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 134}
        return entry

    def resolve(self, repo: str, revision: str, path: str, space: str = "") -> None:
        oid, files = self.snapshot("spaces" if space else "models", repo, revision)
        if repo in self.hub.gated:
            raise Refused(403, "GatedRepo", f"Access to model {repo} is restricted and you are not in its list.")
        if path not in files:
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{files[path].oid}"', "Accept-Ranges": "bytes"}
        if not files[path].large:
            return self.send(files[path].content, headers=headers)
        linked = {"X-Linked-Etag": f'"{files[path].oid}"', "X-Linked-Size": str(len(files[path].content))}
        location = {"Location": f"{self.hub.store_url}/lfs/{files[path].oid}"}
        self.send(b"", 302, {**headers, **linked, **location})
