"""A Hugging Face hub of a few kilobytes on 127.0.0.1: the endpoints that its own client calls."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories in memory, served as long as the process lives.

    Attributes:
        url: For HF_ENDPOINT.
        calls: "METHOD path" of every request so far.
        ranges: Where each request for a part of a file began.
        faults: By a part of a path: what goes wrong, once each: "500", "cut" (the connection
            breaks half-way) or "wrong" (bytes that are not the file's).
        token: What private repositories ask for.
    """

    def __init__(self):
        self.forget()
        hub = self

        class Bound(Handler):
            """Knows its hub."""

            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.cdn_url = self.url.replace("127.0.0.1", "localhost")  # large files: another host
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def forget(self):
        """Everything."""
        self.commits, self.heads, self.private, self.objects = {}, {}, set(), {}
        self.calls, self.ranges, self.faults, self.token = [], [], {}, "hf_test"

    def commit(self, repo, files):
        """A new commit on main with these files beside those that are there; its sha."""
        before = self.commits.get((repo, self.heads.get(repo)), {})
        content = {**before, **files}
        digest = hashlib.sha1(repr((repo, sorted(content.items()))).encode()).hexdigest()
        self.commits[repo, digest] = content
        self.heads[repo] = digest
        for data in files.values():
            self.objects[hashlib.sha256(data).hexdigest()] = data
        return digest

    def fault(self, path):
        """What goes wrong with this request, if anything does."""
        for part in list(self.faults):
            if part in path:
                return self.faults.pop(part)
        return None


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server_hub: Hub

    def log_message(self, *args):
        """Say nothing."""

    def do_HEAD(self):
        self.serve(b"")

    def do_GET(self):
        self.serve(b"")

    def do_POST(self):
        self.serve(self.body())

    def do_PUT(self):
        self.serve(self.body())

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def serve(self, body):
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        hub.calls.append(f"{self.command} {path}")
        fault = hub.fault(path) if self.command != "HEAD" else None
        if fault == "500":
            return self.reply(500, b"oops")
        if fault == "html":
            return self.reply(200, b"<html>Please log in</html>")
        for pattern, method in ROUTES:
            found = re.fullmatch(pattern, path)
            if found:
                return method(self, *found.groups(), body=body, fault=fault)
        return self.reply(404, b"no such endpoint")

    def reply(self, status, data=b"", headers=None, *, size=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if size is None else size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self, value):
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def files(self, repo, revision):
        """The commit and its files, or None after an error was sent."""
        hub = self.server_hub
        if repo in hub.private and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.reply(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"})
            return None
        if repo not in hub.heads:
            self.reply(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no repo"})
            return None
        digest = hub.heads[repo] if revision == "main" else revision
        if (repo, digest) not in hub.commits:
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return digest, hub.commits[repo, digest]

    def info(self, repo, revision="main", *, body, fault):
        found = self.files(repo, revision)
        if found:
            names = [{"rfilename": name} for name in found[1]]
            self.json({"_id": "0", "id": repo, "sha": found[0], "siblings": names, "tags": []})

    def tree(self, repo, revision, *, body, fault):
        found = self.files(repo, revision)
        if found:
            self.json([entry(name, data) for name, data in found[1].items()])

    def resolve(self, repo, revision, name, *, body, fault):
        found = self.files(repo, revision)
        if not found:
            return
        digest, files = found
        if name not in files:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": digest})
            return
        data, about = files[name], {"X-Repo-Commit": digest}
        if is_large(name):
            oid = hashlib.sha256(data).hexdigest()
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            location = {"Location": f"{self.server_hub.cdn_url}/cdn/{oid}"}
            self.reply(302, b"", {**about, **linked, **location})
        else:
            self.send(data, {**about, "ETag": f'"{blob_id(data)}"'}, fault)

    def cdn(self, oid, *, body, fault):
        self.send(self.server_hub.objects[oid], {"ETag": f'"{oid}"'}, fault)

    def send(self, data, headers, fault):
        """A file, from where the client asks for it."""
        if fault == "wrong":
            data = bytes(len(data))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {**headers, "Accept-Ranges": "bytes"}
        status, part = 200, data
        if wanted and self.command == "GET":
            first = int(wanted[1])
            self.server_hub.ranges.append(first)
            part = data[first:]
            status = 206
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if fault == "cut":
            self.reply(status, part[: len(part) // 2], headers, size=len(part))
            self.close_connection = True
        else:
            self.reply(status, part, headers)

    def create(self, *, body, fault):
        wanted = json.loads(body)
        organization = wanted.get("organization") or "someone"
        repo = f"{organization}/{wanted['name']}"
        if repo not in self.server_hub.heads:
            self.server_hub.commit(repo, {})
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.server_hub.private.add(repo)
        self.json({"url": f"{self.server_hub.url}/{repo}", "name": repo, "id": repo})

    def preupload(self, repo, revision, *, body, fault):
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if is_large(name) else "regular" for name in names}
        files = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]
        self.json({"files": files})

    def lfs_batch(self, repo, *, body, fault):
        objects = [
            {
                "oid": wanted["oid"],
                "size": wanted["size"],
                "actions": {"upload": {"href": f"{self.server_hub.url}/upload/{wanted['oid']}"}},
            }
            for wanted in json.loads(body)["objects"]
        ]
        self.json({"transfer": "basic", "objects": objects})

    def upload(self, oid, *, body, fault):
        if hashlib.sha256(body).hexdigest() != oid:
            self.reply(400, b"wrong bytes")
            return
        self.server_hub.objects[oid] = body
        self.reply(200)

    def commit(self, repo, revision, *, body, fault):
        files = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server_hub.objects[value["oid"]]
        digest = self.server_hub.commit(repo, files)
        url = f"{self.server_hub.url}/{repo}/commit/{digest}"
        self.json({"success": True, "commitOid": digest, "commitUrl": url, "hookOutput": ""})

    def yaml(self, *, body, fault):
        self.json({"errors": [], "warnings": []})

    def who(self, *, body, fault):
        self.json({"name": "someone", "type": "user", "orgs": []})


def is_large(name):
    """Whether the hub keeps it in its large file storage."""
    return name.endswith(".safetensors")


def blob_id(data):
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(name, data):
    """Of a tree's listing."""
    result = {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}
    if is_large(name):
        result["lfs"] = {
            "oid": hashlib.sha256(data).hexdigest(),
            "size": len(data),
            "pointerSize": 130,
        }
    return result


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (rf"/api/models/{REPO}", Handler.info),
    (rf"/api/models/{REPO}/revision/(.+)", Handler.info),
    (rf"/api/models/{REPO}/tree/([^/]+)", Handler.tree),
    (rf"/api/models/{REPO}/preupload/(.+)", Handler.preupload),
    (rf"/api/models/{REPO}/commit/(.+)", Handler.commit),
    (rf"/{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
    (rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"/cdn/(\w+)", Handler.cdn),
    (r"/upload/(\w+)", Handler.upload),
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.yaml),
    (r"/api/whoami-v2", Handler.who),
]
