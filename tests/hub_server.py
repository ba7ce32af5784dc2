"""A Hugging Face Hub on loopback, in memory, for tests: what huggingface_hub 2.4 needs to push, list and load models.

    with HubServer() as hub:
        api = HfApi(endpoint=hub.url, token="hf_write")

Faults and delays name a part of the path:

    hub.fail("/commit/", 503, times=2)      # answers 503 twice, then works
    hub.drop("/lfs-objects/", times=1)      # reads half of the body and closes the connection
    hub.delay("/preupload/", 0.5)           # answers after half a second
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

DATE = "2026-01-01T00:00:00.000Z"
MODEL_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(\S+))?")
LFS_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
LFS_OBJECT = re.compile(r"/lfs-objects/([0-9a-f]{64})")
MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class File:
    size: int
    data: bytes | None = None  # None: an LFS object, found by its sha256
    sha256: str | None = None

    @property
    def oid(self) -> str:
        return self.sha256 or git_hash(self.data)

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    tree: dict[str, File]


@dataclass
class Repo:
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", "initial commit", {".gitattributes": File(0, data=b"")})

    def commit(self, branch: str, title: str, tree: dict[str, File]) -> str:
        parent = self.branches.get(branch)
        sha = hashlib.sha1(f"{self.id} {branch} {parent} {title}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, tree)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def files(self, revision: str) -> set[str]:
        return set(self.resolve(revision).tree) - {".gitattributes"}


@dataclass
class Fault:
    fragment: str
    times: float = float("inf")
    status: int | None = None
    drop: bool = False
    seconds: float = 0.0
    drip: bool = False


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Says nothing of a client that went away: a process that was killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class HubServer:
    """Tokens: hf_write may write, hf_read may read; everything may be read without one."""

    def __init__(self, xet_cas_url: str | None = None):
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.xet_cas_url = xet_cas_url
        self.lock = threading.RLock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, fragment: str, status: int, times: float = float("inf")):
        self.faults.append(Fault(fragment, times, status=status))

    def drop(self, fragment: str, times: float = float("inf")):
        self.faults.append(Fault(fragment, times, drop=True))

    def delay(self, fragment: str, seconds: float):
        self.faults.append(Fault(fragment, seconds=seconds))

    def drip(self, fragment: str):
        """Answers a byte at a time."""
        self.faults.append(Fault(fragment, drip=True))

    def faults_for(self, path: str) -> list[Fault]:
        with self.lock:
            hits = [fault for fault in self.faults if fault.fragment in path and fault.times > 0]
            for fault in hits:
                fault.times -= 1
        return hits

    def contents(self) -> list[bytes]:
        """Every byte string that was ever stored."""
        trees = [commit.tree for repo in self.repos.values() for commit in repo.commits.values()]
        return [*self.lfs.values(), *(f.data for tree in trees for f in tree.values() if f.data is not None)]

    # Each route answers (status, headers, body: bytes, or what json.dumps takes).

    def route(self, method: str, path: str, headers, body: bytes):
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        if path == "/api/whoami-v2":
            if token not in ("hf_write", "hf_read"):
                return 401, {}, {"error": "Invalid credentials"}
            role = token.removeprefix("hf_")
            return 200, {}, {"type": "user", "name": "tester", "orgs": [], "auth": {"accessToken": {"role": role}}}
        if path == "/api/validate-yaml":
            return self.validate_card(json.loads(body)["content"])
        if method in ("POST", "PUT", "DELETE") and token != "hf_write" and not path.startswith("/lfs-objects/"):
            return (403 if token else 401), {}, {"error": "This token may not write"}
        if path == "/api/repos/create":
            return self.create_repo(json.loads(body))
        if match := LFS_OBJECT.fullmatch(path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.lfs[match[1]] = body
            return 200, {}, b""
        if LFS_BATCH.fullmatch(path):
            return self.lfs_batch(json.loads(body)["objects"])
        if match := RESOLVE.fullmatch(path):
            return self.resolve(match[1], unquote(match[2]), unquote(match[3]), headers.get("Range", ""))
        if match := MODEL_API.fullmatch(path):
            if match[1] not in self.repos:
                return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
            return self.model_api(method, self.repos[match[1]], match[2] or "", body)
        return 404, {}, {"error": f"no route {method} {path}"}

    @staticmethod
    def validate_card(text: str):
        """Refuse a card as the Hub does: a base model is the id of a model."""
        match = re.match(r"---\n(.*?)^---", text, re.DOTALL | re.MULTILINE)
        data = yaml.safe_load(match[1]) or {} if match else {}
        bases = data.get("base_model") or []
        wrong = [base for base in ([bases] if isinstance(bases, str) else bases) if not MODEL_ID.fullmatch(base)]
        errors = [{"message": f'"base_model" with value "{base}" is not valid. Use a model id'} for base in wrong]
        return 400 if errors else 200, {}, {"errors": errors, "warnings": []}

    def create_repo(self, request: dict):
        repo_id = f"{request.get('organization') or 'tester'}/{request['name']}"
        url = {"url": f"{self.url}/{repo_id}"}
        if repo_id in self.repos:
            return 409, {}, {"error": "You already created this model repo", **url}
        self.repos[repo_id] = Repo(repo_id, private=request.get("visibility") == "private")
        return 200, {}, url

    def lfs_batch(self, objects: list[dict]):
        answers = []
        for item in objects:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.lfs:
                answer["actions"] = {"upload": {"href": f"{self.url}/lfs-objects/{item['oid']}"}}
            answers.append(answer)
        return 200, {"Content-Type": "application/vnd.git-lfs+json"}, {"transfer": "basic", "objects": answers}

    def resolve(self, repo_id: str, revision: str, path: str, byte_range: str):
        commit = self.repos[repo_id].resolve(revision) if repo_id in self.repos else None
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": f"Invalid rev id: {revision}"}
        if path not in commit.tree:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.sha}, {"error": "Entry not found"}
        file = commit.tree[path]
        data = self.lfs[file.sha256] if file.sha256 else file.data
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.sha256:
            headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", byte_range):
            start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return 206, headers, data[start : end + 1]
        return 200, headers, data

    def model_api(self, method: str, repo: Repo, path: str, body: bytes):
        action, _, revision = path.partition("/")
        revision = unquote(revision.partition("/")[0]) or "main"
        if action == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.branches.items()
            ]
            return 200, {}, {"branches": branches, "converts": [], "tags": []}
        if action == "branch":
            if revision in repo.branches:
                return 409, {}, {"error": "Reference already exists"}
            repo.branches[revision] = repo.resolve(json.loads(body).get("startingPoint") or "main").sha
            return 200, {}, {}
        commit = repo.resolve(revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": f"Invalid rev id: {revision}"}
        if action in ("", "revision"):
            files = [{"rfilename": path} for path in commit.tree]
            info = {"id": repo.id, "sha": commit.sha, "private": repo.private, "siblings": files, "tags": []}
            return 200, {}, info | {"downloads": 0, "likes": 0, "createdAt": DATE, "lastModified": DATE}
        if action == "commits":
            history = []
            while commit:
                history.append({"id": commit.sha, "title": commit.title, "message": "", "authors": [], "date": DATE})
                commit = repo.commits.get(commit.parent)
            return 200, {}, history
        if action == "tree":
            return 200, {}, [file.entry(path) for path, file in sorted(commit.tree.items())]
        if action == "preupload":
            files = [self.upload_mode(file, commit) for file in json.loads(body)["files"]]
            return 200, {}, {"files": files}
        if action == "commit":
            return self.commit(repo, revision, commit, [json.loads(line) for line in body.splitlines()])
        if action == "xet-write-token" and self.xet_cas_url:
            expires = int(time.time()) + 3600
            headers = {"X-Xet-Cas-Url": self.xet_cas_url, "X-Xet-Access-Token": "xet"}
            answer = {"casUrl": self.xet_cas_url, "exp": expires, "accessToken": "xet"}
            return 200, headers | {"X-Xet-Token-Expiration": str(expires)}, answer
        return 404, {}, {"error": f"no route {method} {path}"}

    @staticmethod
    def upload_mode(file: dict, commit: Commit) -> dict:
        mode = "lfs" if file["path"].endswith((".safetensors", ".bin", ".pt", ".pth", ".model")) else "regular"
        answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        return answer | ({"oid": commit.tree[file["path"]].oid} if file["path"] in commit.tree else {})

    def commit(self, repo: Repo, branch: str, parent: Commit, operations: list[dict]):
        header = operations[0]["value"]
        if header.get("parentCommit", parent.sha) != parent.sha:
            return 412, {}, {"error": "A commit has happened since. Please refresh and try again."}
        tree = dict(parent.tree)
        for operation in operations[1:]:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    data = base64.b64decode(value["content"])
                    tree[value["path"]] = File(len(data), data=data)
                case "lfsFile":
                    if value["oid"] not in self.lfs and not self.xet_cas_url:
                        return 400, {}, {"error": f"LFS object {value['oid']} is missing"}
                    tree[value["path"]] = File(value["size"], sha256=value["oid"])
                case "deletedFile":
                    del tree[value["path"]]
                case other:
                    return 400, {}, {"error": f"unknown operation {other}"}
        sha = repo.commit(branch, header["summary"], tree)
        return 200, {}, {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo.id}/commit/{sha}"}


def reach_loopback(monkeypatch) -> None:
    """Let huggingface_hub reach a Hub on loopback, without Xet, and shorten the delays."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("tunebook.following.hub.MAX_DELAY", 0.01)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.3)))


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self):
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        faults = self.hub.faults_for(path)
        if any(fault.drop for fault in faults):
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return
        body = self.read_body()
        time.sleep(sum(fault.seconds for fault in faults))
        statuses = [fault.status for fault in faults if fault.status]
        if statuses:
            status, headers, answer = statuses[0], {}, {"error": "injected"}
        else:
            with self.hub.lock:
                status, headers, answer = self.hub.route(self.command, path, self.headers, body)
        if not isinstance(answer, bytes):
            answer, headers = json.dumps(answer).encode(), {"Content-Type": "application/json"} | headers
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(answer))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if any(fault.drip for fault in faults):
                for byte in answer:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
            else:
                self.wfile.write(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET
