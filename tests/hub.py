"""A stand-in of the Hugging Face hub on loopback: as much of its HTTP API as uploads and downloads ask for.

Written against huggingface_hub 2.4. Nothing of the client is replaced: it is only told where the hub is, that
it is online, whose token it has, and to upload by LFS and not by xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"
Files = dict[str, bytes]


class Hub:
    """repos: "datasets/me/name" or "models/me/name" -> path -> content. private: those made so.

    requests: (method, path) of all that was asked, in order. commits: how many were made.
    lost: paths of files that are listed and cannot be had.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Files] = {}
        self.private = set[str]()
        self.lfs: Files = {}
        self.lfs_paths = set[tuple[str, str]]()
        self.requests: list[tuple[str, str]] = []
        self.commits = 0
        self.lost = set[str]()
        self.lock = Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self, token: str | None = TOKEN) -> Iterator[Hub]:
        """Listens, and the client of this process is sent here with `token`."""
        from huggingface_hub import constants

        thread = Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        told = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        try:
            with (
                patch.multiple(constants, HF_TOKEN_PATH="/nonexistent/token", **told),
                patch.dict("os.environ", {"HF_TOKEN": token or ""}),
            ):
                yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def uploads(self) -> list[str]:
        """Paths of the requests that would change something."""
        return [path for method, path in self.requests if method in ("POST", "PUT")]


def sha_of(files: Files) -> str:
    """A commit hash of a repository that depends on its content alone."""
    sums = [(path, hashlib.sha1(data).hexdigest()) for path, data in sorted(files.items())]
    return hashlib.sha1(json.dumps(sums).encode()).hexdigest()


def blob_of(data: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    """What the hub keeps by LFS; by its name here, as .gitattributes says it there."""
    return path.endswith((".parquet", ".safetensors")) or "/c/" in path


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self) -> None:
            body = self._body()
            path = unquote(urlsplit(self.path).path)
            with hub.lock:
                hub.requests.append((self.command, path))
                status, headers, answer = self._answer(path.strip("/").split("/"), body)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response_only(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _answer(self, words: list[str], body: bytes) -> tuple[int, dict[str, str], Any]:
            if words[0] == "lfs" and self.command == "PUT":
                # Storage is asked with a signed URL and no token.
                hub.lfs[words[1]] = body
                return 200, {}, {}
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return 401, {}, {"error": "Invalid credentials"}
            fixed = {
                "whoami-v2": {"type": "user", "name": "me"},
                "validate-yaml": {"errors": [], "warnings": []},
            }
            if words[0] == "api" and words[1] in fixed:
                return 200, {}, fixed[words[1]]
            if words == ["api", "repos", "create"]:
                return self._create(json.loads(body))
            return self._of_a_repository(words, body)

        def _of_a_repository(self, words: list[str], body: bytes) -> tuple[int, dict[str, str], Any]:
            if words[0] == "lfs":
                given = json.loads(body)
                stored = hub.lfs.get(given["oid"], b"")
                sound = hashlib.sha256(stored).hexdigest() == given["oid"] and len(stored) == given["size"]
                return (200 if sound else 422), {}, {}
            if words[-3:] == ["lfs", "objects", "batch"]:
                return 200, {}, {"transfer": "basic", "objects": self._batch(json.loads(body))}
            if words[0] == "api":
                return self._api("/".join(words[1:4]), words[4:], body)
            kind = ["datasets"] if words[0] == "datasets" else ["models"]
            rest = words[1:] if words[0] == "datasets" else words
            return self._resolve("/".join(kind + rest[:2]), rest[2:])

        def _create(self, given: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
            kind = "datasets" if given.get("type") == "dataset" else "models"
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            url = f"{hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
            if f"{kind}/{name}" in hub.repos:
                return 409, {}, {"error": "You already created this repo", "url": url}
            hub.repos[f"{kind}/{name}"] = {".gitattributes": b"*.parquet filter=lfs\n"}
            if given.get("visibility") == "private":
                hub.private.add(f"{kind}/{name}")
            return 200, {}, {"url": url, "name": name, "id": name}

        def _batch(self, given: dict[str, Any]) -> list[dict[str, Any]]:
            objects = []
            for one in given["objects"]:
                if one["oid"] not in hub.lfs:
                    upload = {"href": f"{hub.url}/lfs/{one['oid']}"}
                    verify = {"href": f"{hub.url}/lfs/{one['oid']}/verify"}
                    objects.append({**one, "actions": {"upload": upload, "verify": verify}})
                else:
                    objects.append(one)
            return objects

        def _api(self, repo: str, rest: list[str], body: bytes) -> tuple[int, dict[str, str], Any]:
            files = hub.repos.get(repo)
            if files is None:
                return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
            if rest[:1] == ["preupload"]:
                return 200, {}, {"files": [_mode(one, files) for one in json.loads(body)["files"]]}
            if rest[:1] == ["commit"]:
                hub.commits += 1
                for line in body.splitlines():
                    _apply(hub, files, json.loads(line))
                url = f"{hub.url}/{repo}/commit/{sha_of(files)}"
                return 200, {}, {"commitUrl": url, "commitOid": sha_of(files)}
            if rest[:1] == ["tree"] and rest[1] in ("main", sha_of(files)):
                return 200, {}, [_entry(path, data) for path, data in sorted(files.items())]
            if not rest or (rest[0] == "revision" and rest[1] in ("main", sha_of(files))):
                return 200, {}, {"id": repo.partition("/")[2], "sha": sha_of(files), "siblings": []}
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev id"}

        def _resolve(self, repo: str, rest: list[str]) -> tuple[int, dict[str, str], Any]:
            files = hub.repos.get(repo, {})
            data = files.get("/".join(rest[2:]))
            if rest[:1] != ["resolve"] or data is None or "/".join(rest[2:]) in hub.lost:
                return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}
            large = is_large("/".join(rest[2:]))
            etag = hashlib.sha256(data).hexdigest() if large else blob_of(data)
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": sha_of(files)}, data

    return Handler


def _mode(one: dict[str, Any], files: Files) -> dict[str, Any]:
    """How the hub wants a file."""
    mode = "lfs" if is_large(one["path"]) else "regular"
    there = files.get(one["path"])
    oid = None if there is None or mode == "lfs" else blob_of(there)
    return {"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """A line of a tree listing."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_of(data)}
    if is_large(path):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _apply(hub: Hub, files: Files, operation: dict[str, Any]) -> None:
    key, value = operation["key"], operation["value"]
    if key == "file":
        files[value["path"]] = base64.b64decode(value["content"])
    elif key == "lfsFile":
        files[value["path"]] = hub.lfs[value["oid"]]
    elif key == "deletedFile":
        del files[value["path"]]
    else:
        assert key == "header", key
