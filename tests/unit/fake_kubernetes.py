"""A Kubernetes API server that knows pods of one node, and tells who waits what changes."""

from __future__ import annotations

import json
import queue
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Optional
from urllib.parse import parse_qs, urlsplit

TOKEN = "t0ken"  # noqa: S105
_POLL_S = 0.02


class FakeKubernetes(ThreadingHTTPServer):
    """The server; ``with`` runs it. ``pods`` has the metadata of pods by UID.

    ``refuse`` is a status to refuse everything with.
    """

    daemon_threads = True

    def __init__(self, node: str, context: Optional[ssl.SSLContext] = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.node = node
        self.pods: dict[str, dict[str, Any]] = {}
        self.refuse = 0
        self.lists = 0
        self.version = 100
        self.waiting: list[queue.Queue[bytes]] = []
        self.told: list[tuple[int, bytes]] = []
        self._lock = threading.Lock()
        self.ended = threading.Event()
        scheme = "http"
        if context is not None:
            scheme = "https"
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"{scheme}://localhost:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(_POLL_S,))

    def put(self, uid: str, name: str, **annotations: str) -> None:
        """Make a pod, or give it other annotations."""
        kind = "MODIFIED" if uid in self.pods else "ADDED"
        ours = {f"pybpfthrottle.io/{key}": value for key, value in annotations.items()}
        self.pods[uid] = {
            "name": name,
            "namespace": "default",
            "uid": uid,
            "annotations": {"other.io/a": "b", **ours},
        }
        self.tell(kind, self.pods[uid])

    def delete(self, uid: str) -> None:
        """Delete a pod."""
        self.tell("DELETED", self.pods.pop(uid))

    def tell(self, kind: str, metadata: dict[str, Any]) -> None:
        """Tell an event to all who wait."""
        with self._lock:
            self.version += 1
            told = {**metadata, "resourceVersion": str(self.version)}
            event = {"type": kind, "object": {"kind": "PartialObjectMetadata", "metadata": told}}
            line = json.dumps(event).encode() + b"\n"
            self.told.append((self.version, line))
            for one in self.waiting:
                one.put(line)

    def wait(self, version: int) -> queue.Queue[bytes]:
        """Return what is told after a version, now and later."""
        found: queue.Queue[bytes] = queue.Queue()
        with self._lock:
            for at, line in self.told:
                if at > version:
                    found.put(line)
            self.waiting.append(found)
        return found

    def __enter__(self) -> FakeKubernetes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeKubernetes
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer as the API does, and refuse what it would refuse."""
        at = urlsplit(self.path)
        query = {key: value for key, [value] in parse_qs(at.query).items()}
        kind = "PartialObjectMetadata" + "List" * ("watch" not in query)
        status = self.server.refuse
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            status = 401
        elif at.path != "/api/v1/pods":
            status = 404
        elif query["fieldSelector"] != f"spec.nodeName={self.server.node}":
            status = 400
        elif self.headers["Accept"] != f"application/json;as={kind};g=meta.k8s.io;v=v1":
            status = 406
        if status:
            self.send_error(status)
        elif "watch" in query:
            self._watch(int(query["resourceVersion"]))
        else:
            self._list(kind)

    def _list(self, kind: str) -> None:
        self.server.lists += 1
        items = [{"metadata": one} for one in self.server.pods.values()]
        version = {"resourceVersion": str(self.server.version)}
        body = json.dumps({"kind": kind, "metadata": version, "items": items}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _watch(self, version: int) -> None:
        told = self.server.wait(version)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        while not self.server.ended.is_set():
            try:
                event = told.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            if b'"ERROR"' in event:
                break
        self.server.waiting.remove(told)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""
