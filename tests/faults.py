"""An S3 service on a bad day: a proxy that does to some requests what services do then."""

from __future__ import annotations

import socket
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from threading import Lock

from tests.proxy import Proxy

# Answers of S3 that carry nothing out: status, code and message.
REFUSALS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "ServiceUnavailable", "Service is unable to handle request."),
    "throttled": (429, "TooManyRequests", "Please reduce your request rate."),
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "skewed": (403, "RequestTimeTooSkewed", "The difference between the request time and now is too large."),
}
# What passes, and is to be tried again; and what stays until somebody does something about it.
PASSING = ("500", "503", "throttled", "slow down", "slow", "torn", "lost", "reset")
LASTING = ("expired", "skewed")
DELAY = 0.3  # seconds of a slow reply


class FaultyProxy(Proxy):
    """Asks `choose(method, path)` of each request what to do to it: one of PASSING, LASTING, or None.

    counts: of the kinds that were done. A torn reply needs a body; where there is none, the request passes.
    recoveries: seconds from a fault to the next sound reply about the same object, by kind, unless one of
    LASTING came in between; of a slow reply, those that it took.
    """

    def __init__(self, endpoint: str, choose: Callable[[str, str], str | None]) -> None:
        super().__init__(endpoint)
        self.choose = choose
        self.counts: Counter[str] = Counter()
        self.recoveries: dict[str, list[float]] = defaultdict(list)
        self.requests = 0
        self._broken: dict[str, tuple[str, float]] = {}
        self._lock = Lock()

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        kind, begun = self.choose(request.command, request.path), time.monotonic()
        if kind == "reset":
            # Closed with what was sent unread and nothing waited for, so that the client gets a RST.
            linger = struct.pack("ii", 1, 0)
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.close_connection = True
            request.connection.close()
        elif kind in REFUSALS:
            request.rfile.read(int(request.headers.get("Content-Length") or 0))
            status, code, message = REFUSALS[kind]
            body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            self.reply(request, status, headers, b"" if request.command == "HEAD" else body)
        else:
            kind = self._carried_out(request, kind)
        with self._lock:
            self.requests += 1
            self.counts.update([kind] if kind else [])
            if kind in LASTING:
                self._broken.clear()
            elif kind == "slow":
                self.recoveries[kind].append(time.monotonic() - begun)
            elif kind:
                self._broken.setdefault(request.path, (kind, time.monotonic()))
            elif request.path in self._broken:
                broken, since = self._broken.pop(request.path)
                self.recoveries[broken].append(time.monotonic() - since)

    def _carried_out(self, request: BaseHTTPRequestHandler, kind: str | None) -> str | None:
        status, headers, data = self.forward(request)
        if kind == "lost":
            request.close_connection = True
            return kind
        if kind == "slow":
            time.sleep(DELAY)
        torn = kind == "torn" and request.command == "GET" and len(data) > 1
        self.reply(request, status, headers, data, sent=len(data) // 2 if torn else None)
        return None if kind == "torn" and not torn else kind
