"""A stand-in for Google Cloud Storage: buckets in memory behind the JSON API, on this machine.

gcsfs and google-cloud-storage find it by STORAGE_EMULATOR_HOST, tensorstore by
TENSORSTORE_GCS_HTTP_URL: what a test runs is what runs against the cloud. It answers what these
clients ask of one object or one listing, and 400 to the rest.
"""

import contextlib
import email
import itertools
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Objects(dict):
    """The content of every object by "bucket/name"; any bucket exists."""

    def __init__(self):
        super().__init__()
        self.generations = {}
        self.requests = []  # ("GET", "bucket/name", range or None), ("PUT", ...), ("DELETE", ...)
        self.read_only = set()  # buckets that refuse to change
        self.closed = set()  # buckets that refuse everything
        self.discreet = set()  # buckets that refuse to tell about themselves, not their objects
        self.lock = threading.Lock()
        self._counter = itertools.count(1)

    def __setitem__(self, key, content):
        super().__setitem__(key, content)
        self.generations[key] = next(self._counter)

    def names(self, folder):
        """The names of the objects in a folder "bucket/path", relative to it, sorted."""
        start = f"{folder}/"
        return sorted(key.removeprefix(start) for key in self if key.startswith(start))

    def bucket(self, name):
        """A copy of the objects of a bucket."""
        return {key: self[key] for key in self if key.startswith(f"{name}/")}


@contextlib.contextmanager
def serve():
    """Runs the server in a thread; gives its address and the `Objects` it holds."""
    objects = Objects()
    handler = type("Handler", (_Handler,), {"objects": objects, "uploads": {}})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", objects
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_):
        """Says nothing: clients hang up when another answer was enough."""


class _Handler(BaseHTTPRequestHandler):
    """Answers a request by the line of `_ROUTES` that matches it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        """Says nothing."""

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query, keep_blank_values=True)
        self.query = {name: values[-1] for name, values in query.items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, url.path)
            if method == self.command and found:
                bucket, *names = map(urllib.parse.unquote, found.groups())
                refused = self.objects.closed | (
                    set() if method == "GET" else self.objects.read_only
                )
                with self.objects.lock:
                    if bucket in refused:
                        self.fail(403, f"no access to {bucket}")
                    else:
                        action(self, bucket, *names)
                return
        self.fail(400, f"{self.command} {self.path} is unknown to this stand-in")

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def get_bucket(self, bucket):
        if bucket in self.objects.discreet:
            self.fail(403, f"no access to {bucket} itself")
        else:
            self.send_json({"kind": "storage#bucket", "id": bucket, "name": bucket})

    def list_objects(self, bucket):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        first, end = self.query.get("startOffset", ""), self.query.get("endOffset", "\uffff")
        items, prefixes = [], set()
        for name in self.objects.names(bucket):
            rest = name.removeprefix(prefix)
            if not (name.startswith(prefix) and first <= name < end):
                continue
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
            else:
                items.append(self.metadata(f"{bucket}/{name}"))
        self.send_json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def get_object(self, bucket, name):
        key = f"{bucket}/{name}"
        if key not in self.objects:
            self.fail(404, f"No such object: {key}")
        elif self.query.get("alt") != "media":
            self.send_json(self.metadata(key))
        elif self.condition_holds(key):
            self.send_content(key)

    def send_content(self, key):
        content, asked = self.objects[key], self.headers.get("Range")
        self.objects.requests.append(("GET", key, asked))
        headers = {"X-Goog-Generation": self.objects.generations[key]}
        if not asked:
            self.send(200, content, headers)
            return
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", asked).groups()
        start = int(first) if first else max(len(content) - int(last), 0)
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            self.fail(416, "the range begins behind the end")
            return
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self.send(206, content[start:end], headers)

    def delete_object(self, bucket, name):
        key = f"{bucket}/{name}"
        self.objects.requests.append(("DELETE", key, None))
        if key not in self.objects:
            self.fail(404, f"No such object: {key}")
        elif self.condition_holds(key):
            del self.objects[key]
            self.send(204, b"")

    def move_object(self, bucket, name, to_name):
        self.objects[f"{bucket}/{to_name}"] = self.objects.pop(f"{bucket}/{name}")
        self.send_json(self.metadata(f"{bucket}/{to_name}"))

    def copy_object(self, bucket, name, to_bucket, to_name):
        self.objects[f"{to_bucket}/{to_name}"] = self.objects[f"{bucket}/{name}"]
        self.send_json({"kind": "storage#rewriteResponse", "done": True})

    def upload(self, bucket):
        """Takes an object in one request, with or without metadata, or a chunk of a long one."""
        kind = self.query.get("uploadType")
        if "upload_id" in self.query:
            key, content = self.uploads[self.query["upload_id"]]
            self.uploads[self.query["upload_id"]] = key, content + self.body
            if self.headers["Content-Range"].endswith("/*"):
                received = len(content) + len(self.body)
                self.send(308, b"", {"Range": f"bytes=0-{received - 1}"})
            else:
                self.store(key, content + self.body)
        elif kind == "resumable":
            name, upload = (
                self.query.get("name") or json.loads(self.body)["name"],
                len(self.uploads),
            )
            self.uploads[str(upload)] = f"{bucket}/{name}", b""
            place = f"/upload/storage/v1/b/{bucket}/o?upload_id={upload}"
            self.send(200, b"", {"Location": f"http://{self.headers['Host']}{place}"})
        elif kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
            boundary = email.message_from_bytes(head).get_boundary().encode()
            _, *parts = self.body.split(b"--" + boundary)
            fields, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts[:2])
            self.store(f"{bucket}/{json.loads(fields)['name']}", re.sub(rb"\r?\n\Z", b"", content))
        else:
            self.store(f"{bucket}/{self.query['name']}", self.body)

    def store(self, key, content):
        if self.condition_holds(key):
            self.objects.requests.append(("PUT", key, None))
            self.objects[key] = content
            self.send_json(self.metadata(key))

    def condition_holds(self, key):
        """Whether the object has the generation that the request asks for; without one it is 0."""
        generation = self.objects.generations[key] if key in self.objects else 0
        holds = (
            int(self.query.get("ifGenerationMatch", generation)) == generation
            and int(self.query.get("ifGenerationNotMatch", -1)) != generation
        )
        if not holds:
            self.fail(412, f"{key} has generation {generation}")
        return holds

    def metadata(self, key):
        bucket, name = key.split("/", 1)
        generation = str(self.objects.generations[key])
        return {
            "kind": "storage#object",
            "id": f"{key}/{generation}",
            "bucket": bucket,
            "name": name,
            "size": str(len(self.objects[key])),
            "generation": generation,
            "metageneration": "1",
            "etag": generation,
            "timeCreated": "2021-03-21T00:00:00Z",
            "updated": "2021-03-21T00:00:00Z",
        }

    def fail(self, status, message):
        self.send_json({"error": {"code": status, "message": message}}, status)

    def send_json(self, fields, status=200):
        self.send(status, json.dumps(fields).encode(), {"Content-Type": "application/json"})

    def send(self, status, content, headers=None):
        self.send_response(status)
        fields = {"Content-Type": "application/octet-stream", **(headers or {})}
        for name, value in {**fields, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)


_ROUTES = [
    ("GET", "/storage/v1/b/([^/]+)", _Handler.get_bucket),
    ("GET", "/storage/v1/b/([^/]+)/o", _Handler.list_objects),
    ("GET", "(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", _Handler.get_object),
    ("DELETE", "/storage/v1/b/([^/]+)/o/([^/]+)", _Handler.delete_object),
    ("POST", "/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", _Handler.move_object),
    (
        "POST",
        "/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)",
        _Handler.copy_object,
    ),
    ("POST", "/upload/storage/v1/b/([^/]+)/o", _Handler.upload),
]
