"""A proxy on loopback before a real S3 server: it loses replies, forgets headers, or goes away."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit


class Proxy:
    """Passes every request on to `endpoint`. url: where it listens.

    lose_replies: carry out the first PUT of each object and drop the reply; lost: their paths.
    ignore: a header, in lower case, that the server is not told of.
    swallow: PUTs of paths that end so are answered as done, and are not carried out.
    """

    def __init__(
        self, endpoint: str, lose_replies: bool = False, ignore: str = "", swallow: str | None = None
    ) -> None:
        self.lose_replies, self.ignore, self.swallow = lose_replies, ignore, swallow
        self.lost = set[str]()
        self._target = urlsplit(endpoint)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                proxy.serve(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.gone = False

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        """One request, from its headers on."""
        reply = self.forward(request)
        if self.lose_replies and request.command == "PUT" and request.path not in self.lost:
            self.lost.add(request.path)
            request.close_connection = True
            return
        self.reply(request, *reply)

    def reply(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        sent: int | None = None,
    ) -> None:
        """sent: bytes of `data` after which the connection ends."""
        request.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                request.send_header(name, value)
        length = dict(headers).get("Content-Length", "0") if request.command == "HEAD" else len(data)
        request.send_header("Content-Length", str(length))
        request.end_headers()
        request.wfile.write(data[:sent])
        if sent is not None:
            request.close_connection = True

    def forward(self, request: BaseHTTPRequestHandler) -> tuple[int, list[tuple[str, str]], bytes]:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        headers = {name: value for name, value in request.headers.items() if name.lower() != self.ignore}
        if self.gone:
            raise ConnectionError("the proxy has gone away")
        if request.command == "PUT" and self.swallow and request.path.endswith(self.swallow):
            return 200, [("ETag", '"0"')], b""
        upstream = http.client.HTTPConnection(self._target.hostname or "", self._target.port)
        upstream.request(request.command, request.path, body, headers)
        reply = upstream.getresponse()
        return reply.status, reply.getheaders(), reply.read()

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        # A request that finds the proxy gone ends its connection; nobody wants its traceback.
        self._server.handle_error = lambda request, address: None  # type: ignore[method-assign]
        Thread(target=self._server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
