"""A real web server on loopback whose connections can be made to fail."""

import http.server
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        ranges: Whether requests for a part are answered with that part.
        drops: How many of the coming bodies are cut in the middle by closing the connection.
        statuses: Answers that the coming requests get instead of a file.
        requests: Path, Range header and bytes sent of each request so far.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges, self.drops = Path(folder), True, 0
        self.statuses: list[int] = []
        self.requests: list[tuple[str, str | None, int]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sent(self, ending: str = ".tar") -> int:
        return sum(size for path, _, size in self.requests if path.endswith(ending))

    def handle_error(self, request, client_address):
        """A client may leave whenever it likes."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Nothing on the console."""

    def do_GET(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        wanted = self.headers.get("Range")
        with server.lock:
            status = server.statuses.pop(0) if server.statuses else 0
        file = server.folder / path.lstrip("/")
        if not status and not file.is_file():
            status = 404
        if status:
            server.requests.append((path, wanted, 0))
            self.send_error(status)
            return
        total, start, end = file.stat().st_size, 0, None
        if wanted and server.ranges:
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            start, end = int(low), int(high) + 1 if high else None
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            last = min(end or total, total) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{total}")
        else:
            self.send_response(200)
        with file.open("rb") as opened:
            opened.seek(start)
            content = opened.read(total if end is None else end - start)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Sat, 28 Nov 2026 00:00:00 GMT")
        self.end_headers()
        with server.lock:
            drop = server.drops > 0 and path.endswith(".tar")
            server.drops -= drop
        if drop:
            content = content[: len(content) // 2]
        server.requests.append((path, wanted, len(content)))
        self.wfile.write(content)
        if drop:
            self.wfile.flush()
            self.close_connection = True


@contextmanager
def serving(folder: Path):
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
