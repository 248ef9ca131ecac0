"""A stand-in of the Hub's HTTP interface on this machine: repositories, branches, commits, large files."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_of_the_tests"
MAIN = hashlib.sha1(b"main").hexdigest()  # the commit of main


class Hub:
    """What is there: files by repository, branch and name; large ones come by their hash first."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.uploaded: dict[str, bytes] = {}
        self.address = ""

    def answer(self, method: str, path: str, body: bytes, is_known: bool) -> tuple[int, dict[str, str], Any]:
        """Status, headers and content, JSON or bytes. is_known: whether the token came with the request."""
        parts = [unquote(part) for part in path.partition("?")[0].strip("/").split("/")]
        match method, parts:
            case "GET" | "HEAD", [user, name, "resolve", revision, *file]:
                return self.file(f"{user}/{name}", revision, "/".join(file), is_known)
            case "GET", ["api", "models", user, name, "tree", revision] if f"{user}/{name}" in self.repos:
                files = self.repos[f"{user}/{name}"][self.branch(f"{user}/{name}", revision)]
                listed = [{"type": "file", "path": path, "size": len(body), "oid": "0"} for path, body in files.items()]
                return 200, {}, listed
            case "GET", ["api", "models", user, name, *_]:
                repo = f"{user}/{name}"
                if repo not in self.repos or (repo in self.private and not is_known):
                    return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
                card = self.repos[repo]["main"].get("README.md", b"").decode()
                stated = re.findall(r"^license: (.+)$", card, re.MULTILINE)
                card_data = {"license": stated[0]} if stated else {}
                return 200, {}, {"id": repo, "private": repo in self.private, "cardData": card_data, "sha": MAIN}
        if not is_known:
            return 401, {}, {"error": "Invalid username or password."}
        told = json.loads(body) if body[:1] == b"{" and b"\n{" not in body else {}
        match method, parts:
            case "POST", ["api", "repos", "create"]:
                repo = f"{told.get('organization') or 'user'}/{told['name']}"
                if (told.get("private") or told.get("visibility") == "private") and repo not in self.repos:
                    self.private.add(repo)
                status = 409 if repo in self.repos else 200
                self.repos.setdefault(repo, {"main": {}})
                return status, {}, {"url": f"{self.address}/{repo}", "name": repo, "id": repo}
            case "POST", ["api", "models", user, name, "branch", branch]:
                files = self.repos[f"{user}/{name}"]
                status = 409 if branch in files else 200
                files.setdefault(branch, dict(files["main"]))
                return status, {}, {}
            case "POST", ["api", "validate-yaml"]:
                return 200, {}, {"errors": [], "warnings": []}
            case "POST", ["api", "models", _, _, "preupload", _]:
                modes = {True: "lfs", False: "regular"}
                files = [
                    {"path": file["path"], "uploadMode": modes[file["path"].endswith((".safetensors", ".png"))],
                     "shouldIgnore": False}
                    for file in told["files"]
                ]  # fmt: skip
                return 200, {}, {"files": files}
            case "POST", [_, _, "info", "lfs", "objects", "batch"]:
                objects = [
                    {**one, "authenticated": True, "actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}}
                    for one in told["objects"]
                ]
                return 200, {}, {"transfer": "basic", "objects": objects}
            case "PUT", ["lfs", digest]:
                assert hashlib.sha256(body).hexdigest() == digest
                self.uploaded[digest] = body
                return 200, {}, {}
            case "POST", ["api", "models", user, name, "commit", branch]:
                files = self.repos[f"{user}/{name}"].setdefault(branch, {})
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "lfsFile":
                        files[line["value"]["path"]] = self.uploaded[line["value"]["oid"]]
                commit = hashlib.sha1(body).hexdigest()
                url = f"{self.address}/{user}/{name}/commit/{commit}"
                return 200, {}, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}
        return 404, {}, {"error": f"the stand-in knows no {method} {path}"}

    def branch(self, repo: str, revision: str) -> str:
        """By its name, or that of its commit."""
        return {hashlib.sha1(name.encode()).hexdigest(): name for name in self.repos[repo]}.get(revision, revision)

    def file(self, repo: str, revision: str, file: str, is_known: bool) -> tuple[int, dict[str, str], Any]:
        """A file of a branch; a commit's name is the hash of its branch's name."""
        if repo not in self.repos or (repo in self.private and not is_known):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        branch = self.branch(repo, revision)
        if branch not in self.repos[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if (content := self.repos[repo][branch].get(file)) is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        digest = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{digest}"', "X-Repo-Commit": hashlib.sha1(branch.encode()).hexdigest()}, content


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub without repositories, at its `address`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.path.startswith("/lfs/")
            status, headers, content = hub.answer(self.command, self.path, body, is_known)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = reply

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
