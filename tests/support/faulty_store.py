"""An HTTP proxy in front of the S3 server of the tests that answers chosen requests with an error.

`store.fault = rule`, where rule(method, path with query, number of the request) returns None (pass on) or a Fault.
"""

import http.client
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
STATUS = {"AccessDenied": 403, "ExpiredToken": 400, "SlowDown": 503, "InternalError": 500, "NoSuchUpload": 404}
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "te", "upgrade"}


@dataclass(frozen=True)
class Fault:
    """What a request gets in place of its answer. stored: the store carries the request out first."""

    code: str = ""  # of S3, a key of STATUS
    reset: bool = False  # the connection is closed without an answer
    truncated: bool = False  # half of the body, then the connection is closed
    seconds: float = 0.0  # of delay, before anything else
    stored: bool = False


Rule = Callable[[str, str, int], Fault | None]


class FaultyStore:
    """A context manager; `endpoint` is the address of the proxy."""

    def __init__(self, endpoint: str):
        self.target = urlsplit(endpoint).netloc
        self.fault: Rule = lambda method, path, number: None
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # header and body in one packet: two would wait 40 ms for the client's delayed ACK
            disable_nagle_algorithm = True

            def log_message(self, *_):
                pass

            def handle_expect_100(self):
                super().handle_expect_100()
                self.wfile.flush()
                return True

            def _answer(self):
                store._answer(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultyStore":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            number = len(self.requests)
            self.requests.append((request.command, request.path))
        body = _body(request)
        fault = self.fault(request.command, request.path, number)
        if fault:
            time.sleep(fault.seconds)
        status, headers, content = 0, [], b""
        if fault is None or fault.truncated or fault.stored or not (fault.code or fault.reset):
            status, headers, content = self._forward(request, body)
        if fault and fault.reset:
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
            return
        if fault and fault.code:
            status, headers, content = STATUS[fault.code], [], ERROR.format(code=fault.code).encode()
        length = next((v for k, v in headers if k.lower() == "content-length"), str(len(content)))
        request.send_response(status)
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP | {"content-length"}:
                request.send_header(name, value)
        request.send_header("Content-Length", length if request.command == "HEAD" else str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            cut = bool(fault and fault.truncated)
            request.wfile.write(content[: len(content) // 2] if cut else content)
            request.wfile.flush()
            request.close_connection = request.close_connection or cut

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.target, timeout=30)
        headers = {
            k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP | {"content-length", "expect"}
        }
        connection.request(request.command, request.path, body=body, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), content


def _body(request: BaseHTTPRequestHandler) -> bytes:
    """The body as it was sent. moto itself reads the chunks of `aws-chunked`; those of HTTP are joined here."""
    if "chunked" not in request.headers.get("Transfer-Encoding", ""):
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    parts = []
    while size := int(request.rfile.readline().split(b";")[0], 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(parts)
