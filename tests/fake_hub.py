"""A small Hugging Face Hub on localhost: the installed client talks to it over real HTTP.

    with FakeHub(token="hf_...") as hub:  # a real server, from here to `stop`
        ...  # with HF_ENDPOINT=hub.url, HF_TOKEN, and HF_HUB_DISABLE_XET=1 so that large files take the LFS way
        hub.files["somebody/tiny"]["model.safetensors"]  # -> bytes

It answers what `whoami`, `create_repo` and `upload_folder` ask, and is strict where the real Hub is: a
repository must exist before a commit, a commit may name only large files that have arrived whole, and every
request but the PUT to the storage needs the token.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPO = r"(?P<repo>[^/]+/[^/]+)"
LFS_SIZE, LFS_NAMES = 100_000, (".safetensors", ".png")  # as on the Hub, by size or by .gitattributes


class Refusal(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, error: str, **more):
        self.status, self.answer = status, {"error": error, **more}


class FakeHub:
    """`fail` may be "commit" (500 at the commit), "upload" (403 at the storage) or "auth" (401 everywhere)."""

    def __init__(self, token: str, user: str = "somebody"):
        self.token, self.user, self.fail = token, user, None
        self.files = {}  # repository -> path -> bytes
        self.visibility = {}  # repository -> what create_repo asked for
        self.messages = []  # of the commits
        self.requests, self.authorizations = [], []  # "POST /api/repos/create" and its Authorization header or None
        self._stored = {}  # sha256 -> bytes that arrived at the storage

        class Handler(BaseHTTPRequestHandler):  # speaks HTTP/1.0, so that no connection outlives `stop`
            def reply(handler):
                body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
                path, authorization = urlsplit(handler.path).path, handler.headers.get("Authorization")
                try:
                    status, answer = 200, self.answer(handler.command, path, authorization, body)
                except Refusal as refusal:
                    status, answer = refusal.status, refusal.answer
                data = json.dumps(answer).encode()
                handler.send_response(status)
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data)

            do_GET = do_POST = do_PUT = reply

            def log_message(handler, *args):  # stderr belongs to the tests
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        """From here on connections are refused. A second call does nothing."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()

    def answer(self, method: str, path: str, authorization: str | None, body: bytes) -> dict:
        self.requests.append(f"{method} {path}")
        self.authorizations.append(authorization)
        for wanted, pattern, route in ROUTES:
            if method == wanted and (match := re.fullmatch(pattern, path)):
                # The link to the storage is signed by itself on the real Hub and carries no token.
                if method != "PUT" and (self.fail == "auth" or authorization != f"Bearer {self.token}"):
                    raise Refusal(401, "Invalid credentials in Authorization header")
                parts = {name: unquote(part) for name, part in match.groupdict().items()}
                if "repo" in parts and parts["repo"] not in self.files:
                    raise Refusal(404, "Repository not found")
                return route(self, body, **parts)
        raise Refusal(404, f"the fake Hub does not know {method} {path}")

    def whoami(self, body):
        return {"type": "user", "name": self.user}

    def validate_yaml(self, body):
        return {"errors": [], "warnings": []}

    def create(self, body):
        asked = json.loads(body)
        repo = f"{asked['organization'] or self.user}/{asked['name']}"
        if repo in self.files:
            raise Refusal(409, "You already created this model repo", url=f"{self.url}/{repo}")
        self.files[repo], self.visibility[repo] = {}, asked.get("visibility")
        return {"url": f"{self.url}/{repo}"}

    def info(self, body, repo, revision=None):
        return {"id": repo, "sha": self._head()}

    def preupload(self, body, repo, revision):
        files = json.loads(body)["files"]
        for file in files:
            large = file["size"] > LFS_SIZE or file["path"].endswith(LFS_NAMES)
            file |= {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if (there := self.files[repo].get(file["path"])) is not None:  # the client leaves out what has this id
                blob = there if large else b"blob %d\0" % len(there) + there
                file["oid"] = (hashlib.sha256 if large else hashlib.sha1)(blob).hexdigest()
        return {"files": files}

    def lfs_batch(self, body, repo):
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self._stored:
                item["actions"] = {"upload": {"href": f"{self.url}/storage/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def store(self, body, oid):
        if self.fail == "upload":
            raise Refusal(403, "Request has expired")
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content does not have this sha256")
        self._stored[oid] = body
        return {}

    def commit(self, body, repo, revision):
        if self.fail == "commit":
            raise Refusal(500, "Internal Server Error")
        (_, header), *operations = (json.loads(line).values() for line in body.splitlines())
        files = dict(self.files[repo])
        for kind, value in operations:
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile" and len(self._stored.get(value["oid"], b"")) == value["size"]:
                files[value["path"]] = self._stored[value["oid"]]
            else:
                raise Refusal(400, f"cannot commit {kind} {value['path']}")
        self.files[repo] = files
        self.messages.append(header["summary"])
        return {"success": True, "commitOid": self._head(), "commitUrl": f"{self.url}/{repo}/commit/{self._head()}"}

    def _head(self) -> str:
        return f"{len(self.messages):040x}"


ROUTES = (
    ("GET", "/api/whoami-v2", FakeHub.whoami),
    ("POST", "/api/validate-yaml", FakeHub.validate_yaml),
    ("POST", "/api/repos/create", FakeHub.create),
    ("GET", f"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?", FakeHub.info),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", FakeHub.preupload),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", FakeHub.lfs_batch),
    ("PUT", "/storage/(?P<oid>[0-9a-f]{64})", FakeHub.store),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)", FakeHub.commit),
)
