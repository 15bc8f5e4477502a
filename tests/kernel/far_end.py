"""The far end of the pages' transfers: ``python far_end.py ADDRESS`` serves HTTP on port 80.

GET / and a chunked PUT last as long as the client wants; any other path has FILE_BYTES, and an
upload that tells its length is answered.
"""

from __future__ import annotations

import sys
import threading
from http.server import ThreadingHTTPServer

from pybpfthrottle.demo import peer

# Long enough for a page to show a rate, not only the burst, at 1 MB/s.
FILE_BYTES = 4_000_000


class FarEnd(peer.Handler):
    """As the demo's server, with files that end."""

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        """A file, or all there is."""
        if self.path == "/":
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(FILE_BYTES))
        self.end_headers()
        self.wfile.write(bytes(FILE_BYTES))

    def do_PUT(self) -> None:  # noqa: N802 - http.server's name
        """Take a file and thank for it, or take all there is."""
        length = self.headers.get("Content-Length")
        if length is None:
            super().do_PUT()
            return
        self.rfile.read(int(length))
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()


if __name__ == "__main__":
    server = ThreadingHTTPServer((sys.argv[1], 80), FarEnd)
    server.daemon_threads = True
    print(peer.READY, flush=True)
    # Whoever started it holds the other end: it ends with them, however they end.
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
