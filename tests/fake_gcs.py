"""A stand-in for Google Cloud Storage: buckets in memory behind the JSON API, on this machine.

gcsfs and google-cloud-storage find it by STORAGE_EMULATOR_HOST, tensorstore by
TENSORSTORE_GCS_HTTP_URL, so what a test runs is what runs against the cloud. It knows what these
clients ask for, and answers 400 to the rest.
"""

import base64
import contextlib
import datetime
import email
import hashlib
import itertools
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c


class Objects(dict):
    """The objects of all buckets, content by "bucket/name", and what was asked of them."""

    def __init__(self):
        super().__init__()
        self.generations = {}
        self.requests = []  # (method, "bucket/name", range or None)
        self.read_only = set()  # buckets that refuse to change
        self.lock = threading.Lock()
        self._counter = itertools.count(1)

    def __setitem__(self, key, content):
        super().__setitem__(key, content)
        self.generations[key] = next(self._counter)

    def names(self, folder):
        """Names of the objects in a folder "bucket/path", relative to it."""
        start = f"{folder}/"
        return sorted(key.removeprefix(start) for key in self if key.startswith(start))


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

    def handle_error(self, *_):  # clients hang up when another answer was enough
        pass


class _Handler(BaseHTTPRequestHandler):
    """Answers a request by the first of `_ROUTES` that matches it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _answer(self):
        url = urllib.parse.urlsplit(self.path)
        self.query = {
            name: values[-1]
            for name, values in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()
        }
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, url.path)
            if method == self.command and found:
                with self.objects.lock:
                    return action(self, *map(urllib.parse.unquote, found.groups()))
        self._fail(400, f"{self.command} {self.path} is unknown to this stand-in")

    def bucket(self, name):
        self._json({"kind": "storage#bucket", "id": name, "name": name})

    def list(self, bucket):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        first, end = self.query.get("startOffset", ""), self.query.get("endOffset")
        items, prefixes = [], set()
        for key in sorted(self.objects):
            if not key.startswith(f"{bucket}/{prefix}"):
                continue
            name = key.removeprefix(f"{bucket}/")
            if name < first or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
            else:
                items.append(self._metadata(key))
        self._json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def get(self, bucket, name):
        key = f"{bucket}/{name}"
        if key not in self.objects:
            return self._fail(404, f"No such object: {key}")
        if self.query.get("alt") != "media":
            return self._json(self._metadata(key))
        content, asked = self.objects[key], self.headers.get("Range")
        self.objects.requests.append(("GET", key, asked))
        if self._unmet(key):
            return self._fail(412, "conditionNotMet")
        headers = {"X-Goog-Generation": self.objects.generations[key]}
        if not asked:
            return self._send(200, content, "application/octet-stream", headers)
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", asked).groups()
        start = int(first) if first else max(len(content) - int(last), 0)
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            return self._fail(416, "requestedRangeNotSatisfiable")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop], "application/octet-stream", headers)

    def delete(self, bucket, name):
        key = f"{bucket}/{name}"
        if self._refused(bucket):
            return None
        if key not in self.objects:
            return self._fail(404, f"No such object: {key}")
        self.objects.requests.append(("DELETE", key, None))
        if self._unmet(key):
            return self._fail(412, "conditionNotMet")
        del self.objects[key]
        self._send(204, b"", "application/json")

    def insert(self, bucket):
        if self._refused(bucket):
            return None
        kind = self.query["uploadType"]
        if kind == "media":
            return self._store(f"{bucket}/{self.query['name']}", self.body)
        if kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
            mark = email.message_from_bytes(head).get_boundary().encode()
            _, metadata, content = self.body.split(b"--" + mark)[:3]
            name = json.loads(re.split(rb"\r?\n\r?\n", metadata, maxsplit=1)[1])["name"]
            content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
            return self._store(f"{bucket}/{name}", re.sub(rb"\r?\n\Z", b"", content))
        name = self.query.get("name") or json.loads(self.body)["name"]
        upload = f"{len(self.uploads)}"
        self.uploads[upload] = [f"{bucket}/{name}", b""]
        host = self.headers["Host"]
        location = f"http://{host}/upload/storage/v1/b/{bucket}/o?upload_id={upload}"
        self._send(200, b"", "application/json", {"Location": location})

    def resume(self, bucket):
        upload = self.uploads[self.query["upload_id"]]
        upload[1] += self.body
        if self.headers["Content-Range"].endswith("/*"):
            return self._send(
                308, b"", "application/json", {"Range": f"bytes=0-{len(upload[1]) - 1}"}
            )
        self._store(*upload)

    def post_upload(self, bucket):
        (self.resume if "upload_id" in self.query else self.insert)(bucket)

    def move(self, bucket, name, to_name):
        if not self._refused(bucket):
            self.objects[f"{bucket}/{to_name}"] = self.objects.pop(f"{bucket}/{name}")
            self._json(self._metadata(f"{bucket}/{to_name}"))

    def _store(self, key, content):
        if self._unmet(key):
            return self._fail(412, "conditionNotMet")
        self.objects.requests.append(("PUT", key, None))
        self.objects[key] = content
        self._json(self._metadata(key))

    def _unmet(self, key):
        """Whether the generation is another than the request asks for; 0 is none."""
        generation = self.objects.generations.get(key, 0) if key in self.objects else 0
        match = int(self.query.get("ifGenerationMatch", generation))
        return match != generation or int(self.query.get("ifGenerationNotMatch", -1)) == generation

    def _refused(self, bucket):
        if bucket in self.objects.read_only:
            self._fail(403, f"no write access to {bucket}")
            return True
        return False

    def _metadata(self, key):
        bucket, name = key.split("/", 1)
        content = self.objects[key]
        crc = google_crc32c.value(content).to_bytes(4, "big")
        now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
        return {
            "kind": "storage#object",
            "id": f"{key}/{self.objects.generations[key]}",
            "bucket": bucket,
            "name": name,
            "size": str(len(content)),
            "generation": str(self.objects.generations[key]),
            "metageneration": "1",
            "etag": str(self.objects.generations[key]),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "crc32c": base64.b64encode(crc).decode(),
            "timeCreated": now,
            "updated": now,
        }

    def _json(self, fields):
        self._send(200, json.dumps(fields).encode(), "application/json")

    def _fail(self, status, message):
        fields = {"error": {"code": status, "message": message}}
        self._send(status, json.dumps(fields).encode(), "application/json")

    def _send(self, status, content, kind, headers=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": kind}.items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


_ROUTES = [
    ("GET", "/storage/v1/b/([^/]+)", _Handler.bucket),
    ("GET", "/storage/v1/b/([^/]+)/o", _Handler.list),
    ("GET", "(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)", _Handler.get),
    ("DELETE", "/storage/v1/b/([^/]+)/o/([^/]+)", _Handler.delete),
    ("POST", "/upload/storage/v1/b/([^/]+)/o", _Handler.post_upload),
    ("PUT", "/upload/storage/v1/b/([^/]+)/o", _Handler.resume),
    ("POST", "/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", _Handler.move),
]
